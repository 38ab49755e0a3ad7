"""Log-probabilities of given tokens, without ever holding the logits in fp32, or gathering them.

The backward pass recomputes the softmax from the logits and the saved log-sum-exp. On CPU a kernel
reads the logits as they are (`cpu_softmax`); elsewhere rows are treated in chunks, and fp32 copies
exist for one chunk at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.ops import comm, cpu_softmax

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


@dataclasses.dataclass(frozen=True)
class Shard:
    """The ranks of ``group`` hold a vocabulary in pieces; this one's starts at ``offset``.

    Megatron's vocabulary-parallel cross-entropy (Shoeybi et al. 2019, section 3): three numbers a
    token cross the group, never the logits.
    """

    offset: int
    group: dist.ProcessGroup

    def own(self, targets_N: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Targets as columns of this piece, and which of them lie in it (bool)."""
        column_N = targets_N - self.offset
        here_N = (column_N >= 0) & (column_N < width)
        return torch.where(here_N, column_N, 0), here_N


def _statistics(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Maximum of ``logits / temperature`` and the sum of exponentials less it (N)."""
    if cpu_softmax.serves(logits_NV):
        return cpu_softmax.statistics(logits_NV, temperature)
    num_rows, width = logits_NV.shape
    max_N = logits_NV.new_full((num_rows,), -torch.inf, dtype=_wide(logits_NV.dtype))
    sum_N = torch.zeros_like(max_N)
    for rows, z_CV in _chunks(logits_NV, temperature):
        if width:
            max_N[rows] = z_CV.amax(-1)
            sum_N[rows] = z_CV.sub_(max_N[rows, None]).exp_().sum(-1)
    return max_N, sum_N


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, temperature: float, shard: Shard | None
    ) -> Tensor:
        width, wide = logits_NV.shape[1], _wide(logits_NV.dtype)
        column_N, here_N = targets_N, None
        if shard is not None:
            column_N, here_N = shard.own(targets_N, width)
        if width:
            picked_N = logits_NV.gather(1, column_N[:, None])[:, 0].to(wide)
        else:  # a rank without a word
            picked_N = torch.zeros(targets_N.shape, dtype=wide, device=targets_N.device)
        if here_N is not None:
            picked_N = torch.where(here_N, picked_N, 0.0)
        max_N, sum_N = _statistics(logits_NV, temperature)
        if shard is not None:
            top_N = comm.all_max(max_N.clone(), shard.group, "tp")
            both_2N = torch.stack((sum_N * (max_N - top_N).exp(), picked_N))
            sum_N, picked_N = comm.all_reduce(both_2N, shard.group, "tp")
            max_N = top_N
        lse_N = sum_N.log().add_(max_N)
        ctx.save_for_backward(logits_NV, column_N, here_N, lse_N)
        ctx.temperature = temperature
        return picked_N.div(temperature).sub_(lse_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits_NV, column_N, here_N, lse_N = ctx.saved_tensors
        scaled_N1 = (grad_N.to(lse_N.dtype) / ctx.temperature)[:, None]
        hit_N1 = scaled_N1 if here_N is None else torch.where(here_N[:, None], scaled_N1, 0.0)
        if cpu_softmax.serves(logits_NV):
            rest = (lse_N, scaled_N1[:, 0], column_N, hit_N1[:, 0])
            return cpu_softmax.gradient(logits_NV, ctx.temperature, *rest), None, None, None
        grad_NV = torch.empty_like(logits_NV)
        if not logits_NV.shape[1]:
            return grad_NV, None, None, None
        for rows, z_CV in _chunks(logits_NV, ctx.temperature):
            # d logp / d logits = onehot(target) - softmax(logits)
            z_CV.sub_(lse_N[rows, None]).exp_().mul_(-scaled_N1[rows])
            z_CV.scatter_add_(1, column_N[rows, None], hit_N1[rows])
            grad_NV[rows] = z_CV
        return grad_NV, None, None, None


@torch.compiler.disable
def token_logprobs(
    logits_BTV: Tensor, targets_BT: Tensor, temperature: float = 1.0, shard: Shard | None = None
) -> Tensor:
    """Log-probability (BT, fp32; fp64 for fp64 logits) of each target.

    The distribution is the softmax of ``logits / temperature``.
    Differentiable in the logits; the gradient has their dtype. ``targets_BT`` is int64 in [0, V);
    what is not to count must be masked by the caller, not marked by a negative target. With a
    ``shard``, the logits are this rank's words, and targets are of the whole vocabulary.
    """
    logits_NV = logits_BTV.reshape(targets_BT.numel(), logits_BTV.shape[-1])
    logp_N = _TokenLogprobs.apply(logits_NV, targets_BT.reshape(-1), float(temperature), shard)
    return logp_N.view(targets_BT.shape)  # type: ignore[no-any-return]


@torch.compiler.disable
@torch.no_grad()
def entropy(logits_BTV: Tensor, temperature: float = 1.0, shard: Shard | None = None) -> Tensor:
    """Entropy in nats (BT, fp32; fp64 for fp64 logits) of each distribution; no gradient."""
    width = logits_BTV.shape[-1]
    logits_NV = logits_BTV.reshape(-1, width) if width else logits_BTV.flatten(0, -2)
    wide = _wide(logits_NV.dtype)
    max_N = torch.full((logits_NV.shape[0],), -torch.inf, dtype=wide, device=logits_NV.device)
    sums_2N = max_N.new_zeros((2, logits_NV.shape[0]))  # of exp(z), of exp(z) z
    for rows, z_CV in _chunks(logits_NV, temperature):
        if width:
            max_N[rows] = z_CV.amax(-1)
            # exp(z) z is 0, not NaN, at z = -inf.
            z_CV.sub_(max_N[rows, None])
            p_CV = z_CV.exp()
            sums_2N[0, rows] = p_CV.sum(-1)
            sums_2N[1, rows] = p_CV.mul_(z_CV.clamp_min_(torch.finfo(wide).min)).sum(-1)
    if shard is not None:
        top_N = comm.all_max(max_N.clone(), shard.group, "tp")
        shift_N = (max_N - top_N).clamp_min(torch.finfo(wide).min)
        scale_N = shift_N.exp()
        sums_2N[1] = (sums_2N[1] + sums_2N[0] * shift_N) * scale_N
        sums_2N[0] *= scale_N
        comm.all_reduce(sums_2N, shard.group, "tp")
    # H = lse - E[z], with z shifted by its maximum.
    entropy_N = sums_2N[0].log() - sums_2N[1] / sums_2N[0]
    return entropy_N.view(logits_BTV.shape[:-1])
