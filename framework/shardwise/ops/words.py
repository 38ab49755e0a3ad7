"""Log-probabilities of some words of each token, and of all others together, of cut logits.

Of a vocabulary that ranks hold in parts, the numbers of the words that are asked for cross the
group, never the logits. The backward pass recomputes the softmax, rows in chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardwise.ops import comm
from shardwise.ops.cross_entropy import Shard, _chunks, _wide

# Shape suffixes: N tokens, V words of this rank, K words that are asked for, C rows of a chunk.


@torch.no_grad()
def top_words(logits_NV: Tensor, k: int, shard: Shard | None = None) -> Tensor:
    """The ``k`` likeliest words of each token (NK, int64, of the whole vocabulary), best first."""
    width = logits_NV.shape[1]
    best_NK, ids_NK = logits_NV.topk(min(k, width), dim=1)
    if shard is None:
        return ids_NK
    ranks, missing = shard.group.size(), k - best_NK.shape[1]
    # A rank with fewer words than asked for offers some that are never taken.
    best_NK = torch.nn.functional.pad(best_NK, (0, missing), value=-torch.inf)
    ids_NK = torch.nn.functional.pad(ids_NK + shard.offset, (0, missing))
    all_RNK = best_NK.new_empty((ranks, *best_NK.shape))
    ids_RNK = ids_NK.new_empty((ranks, *ids_NK.shape))
    comm.all_gather(all_RNK.flatten(0, 1), best_NK.contiguous(), shard.group, "tp").wait()
    comm.all_gather(ids_RNK.flatten(0, 1), ids_NK.contiguous(), shard.group, "tp").wait()
    offered = all_RNK.transpose(0, 1).flatten(1)
    return ids_RNK.transpose(0, 1).flatten(1).gather(1, offered.topk(k, dim=1).indices)


def word_logprobs(
    logits_NV: Tensor, ids_NK: Tensor, temperature: float = 1.0, shard: Shard | None = None
) -> Tensor:
    """Log-probability of each word, and of all others in one (N, K + 1; fp32, fp64 for fp64).

    The distribution is the softmax of ``logits / temperature``. ``ids_NK``: of the whole
    vocabulary, each row without doubles. Where no other word is left, the last column is -inf.
    Differentiable in the logits; whoever has the same result computes the same loss from it.
    """
    return _WordLogprobs.apply(logits_NV, ids_NK, float(temperature), shard)  # type: ignore[no-any-return]


class _WordLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, ids_NK: Tensor, temperature: float, shard: Shard | None
    ) -> Tensor:
        (num, width), wide = logits_NV.shape, _wide(logits_NV.dtype)
        column_NK, here_NK = ids_NK, torch.ones_like(ids_NK, dtype=torch.bool)
        if shard is not None:
            column_NK, here_NK = shard.own(ids_NK, width)
        picked_NK = logits_NV.new_zeros(ids_NK.shape, dtype=wide)
        max_N = logits_NV.new_full((num,), -torch.inf, dtype=wide)  # of the other words
        sum_N = torch.zeros_like(max_N)
        for rows, z_CV in _chunks(logits_NV, temperature):
            if width:
                picked_NK[rows] = torch.where(here_NK[rows], z_CV.gather(1, column_NK[rows]), 0.0)
                z_CV.masked_fill_(_asked(column_NK[rows], here_NK[rows], width), -torch.inf)
                max_N[rows] = z_CV.amax(-1)
                shift_C1 = max_N[rows, None].clamp_min(torch.finfo(wide).min)
                sum_N[rows] = z_CV.sub_(shift_C1).exp_().sum(-1)
        if shard is not None:
            top_N = comm.all_max(max_N.clone(), shard.group, "tp")
            shift_N = max_N.clamp_min(torch.finfo(wide).min) - top_N.clamp_min(
                torch.finfo(wide).min
            )
            both = torch.cat(((sum_N * shift_N.exp())[:, None], picked_NK), dim=1)
            comm.all_reduce(both, shard.group, "tp")
            max_N, sum_N, picked_NK = top_N, both[:, 0], both[:, 1:]
        rest_N = sum_N.log() + max_N.clamp_min(torch.finfo(wide).min)
        all_NK1 = torch.cat((picked_NK, rest_N[:, None]), dim=1)
        lse_N = torch.logsumexp(all_NK1, dim=1)
        ctx.save_for_backward(logits_NV, column_NK, here_NK, lse_N, rest_N)
        ctx.temperature = temperature
        return all_NK1 - lse_N[:, None]

    @staticmethod
    def backward(ctx: Any, grad_NK1: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits_NV, column_NK, here_NK, lse_N, rest_N = ctx.saved_tensors
        width = logits_NV.shape[1]
        grad_NV = torch.empty_like(logits_NV)
        grad_NK1 = grad_NK1.to(lse_N.dtype) / ctx.temperature
        total_N, rest_grad_N = grad_NK1.sum(1), grad_NK1[:, -1]
        own_NK = torch.where(here_NK, grad_NK1[:, :-1], 0.0)
        # d log p(w) / dz = onehot(w) - p; d log p(rest) / dz = p / p(rest) on the rest, - p.
        share_N = torch.where(rest_N > -torch.inf, rest_grad_N * (lse_N - rest_N).exp(), 0.0)
        for rows, z_CV in _chunks(logits_NV, ctx.temperature):
            if not width:
                continue
            p_CV = z_CV.sub_(lse_N[rows, None]).exp_()
            asked_CV = _asked(column_NK[rows], here_NK[rows], width)
            factor_CV = torch.where(asked_CV, 0.0, share_N[rows, None]) - total_N[rows, None]
            p_CV.mul_(factor_CV).scatter_add_(1, column_NK[rows], own_NK[rows])
            grad_NV[rows] = p_CV
        return grad_NV, None, None, None


def _asked(column_CK: Tensor, here_CK: Tensor, width: int) -> Tensor:
    """Which of this rank's words are asked for (CV, bool)."""
    mask = torch.zeros((len(column_CK), width + 1), dtype=torch.bool, device=column_CK.device)
    return mask.scatter_(1, torch.where(here_CK, column_CK, width), True)[:, :width]
