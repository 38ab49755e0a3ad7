"""Log-probabilities of given tokens, without ever holding the logits in fp32.

The backward pass recomputes the softmax from the logits and the saved log-sum-exp. Rows are
treated in chunks that fit a core's cache: fp32 copies exist for one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Shape suffixes: B sequences, T tokens, V vocabulary, N = B * T rows, C rows of a chunk.

_CPU_CHUNK_ELEMENTS = 1 << 18  # 1 MiB of fp32: half of a common L2 cache
_GPU_CHUNK_ELEMENTS = 1 << 27  # few launches; 512 MiB of fp32


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(logits_NV: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their ``logits / temperature`` in fp32, all in one reused buffer.

    The buffer matters: fresh memory for every chunk doubled the time on CPU (page faults).
    """
    limit = _GPU_CHUNK_ELEMENTS if logits_NV.is_cuda else _CPU_CHUNK_ELEMENTS
    num_rows, width = logits_NV.shape
    size = max(1, min(num_rows, limit // max(1, width)))
    buffer_CV = logits_NV.new_empty((size, width), dtype=_wide(logits_NV.dtype))
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        z_CV = buffer_CV[: rows.stop - start].copy_(logits_NV[rows])
        if temperature != 1.0:
            z_CV.div_(temperature)
        yield rows, z_CV


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        picked_N = logits_NV.gather(1, targets_N[:, None])[:, 0].to(_wide(logits_NV.dtype))
        lse_N = torch.empty_like(picked_N)
        for rows, z_CV in _chunks(logits_NV, temperature):
            max_C1 = z_CV.amax(-1, keepdim=True)
            z_CV.sub_(max_C1).exp_()
            lse_N[rows] = z_CV.sum(-1).log_().add_(max_C1[:, 0])
        ctx.save_for_backward(logits_NV, targets_N, lse_N)
        ctx.temperature = temperature
        return picked_N.div_(temperature).sub_(lse_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits_NV, targets_N, lse_N = ctx.saved_tensors
        scaled_N1 = (grad_N.to(lse_N.dtype) / ctx.temperature)[:, None]
        grad_NV = torch.empty_like(logits_NV)
        for rows, z_CV in _chunks(logits_NV, ctx.temperature):
            # d logp / d logits = onehot(target) - softmax(logits)
            z_CV.sub_(lse_N[rows, None]).exp_().mul_(-scaled_N1[rows])
            z_CV.scatter_add_(1, targets_N[rows, None], scaled_N1[rows])
            grad_NV[rows] = z_CV
        return grad_NV, None, None


@torch.compiler.disable
def token_logprobs(logits_BTV: Tensor, targets_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability (BT, fp32; fp64 for fp64 logits) of each target.

    The distribution is the softmax of ``logits / temperature``.
    Differentiable in the logits; the gradient has their dtype. ``targets_BT`` is int64 in [0, V);
    what is not to count must be masked by the caller, not marked by a negative target.
    """
    logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    logp_N = _TokenLogprobs.apply(logits_NV, targets_BT.reshape(-1), float(temperature))
    return logp_N.view(targets_BT.shape)  # type: ignore[no-any-return]


@torch.compiler.disable
@torch.no_grad()
def entropy(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats (BT, fp32; fp64 for fp64 logits) of each distribution; no gradient."""
    logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    entropy_N = logits_NV.new_empty(logits_NV.shape[0], dtype=_wide(logits_NV.dtype))
    for rows, z_CV in _chunks(logits_NV, temperature):
        # H = lse - E[z], with z shifted by its maximum; exp(z) z is 0, not NaN, at z = -inf.
        z_CV.sub_(z_CV.amax(-1, keepdim=True))
        p_CV = z_CV.exp()
        total_C = p_CV.sum(-1)
        mean_C = p_CV.mul_(z_CV.clamp_min_(torch.finfo(z_CV.dtype).min)).sum(-1) / total_C
        entropy_N[rows] = total_C.log() - mean_C
    return entropy_N.view(logits_BTV.shape[:-1])
