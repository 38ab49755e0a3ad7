"""Attention of some queries over a block of the keys, with what it takes to merge blocks.

Each block gives its output and its log-sum-exp; its backward pass takes the *merged* ones.
PyTorch's fused kernel does both on CPU (on CUDA, the first half); the explicit pair here serves
masks, dropout and soft caps that fused kernels do not know, and is their reference. A sink is one
block more, of a key that no value belongs to: it is merged last.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from shardwise.ops import cpu_attention, rng
from shardwise.ops.dropout import _NUM_BITS

# Shape suffixes: B sequences, T queries, S keys, H query heads, G key/value heads, K head width.

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Block:
    """Which queries meet which keys, and how."""

    rows: slice  # of the caller's queries
    columns: slice  # of the caller's keys
    allowed_B1TS: Tensor | None = None  # bool; None with is_causal False: all see all
    is_causal: bool = False
    dropout_p: float = 0.0
    rng_keys_BHt: Tensor | None = None  # keys of the queries, before heads are folded in
    key_index: Tensor | None = None  # global index of each key, for dropout
    head_offset: int = 0
    soft_cap: float | None = None  # scores become cap * tanh(scores / cap)

    @property
    def drops(self) -> bool:
        """Whether attention weights are dropped."""
        return self.rng_keys_BHt is not None and self.dropout_p > 0.0

    def keep(self, num_heads: int) -> Tensor:
        """True where a weight stays; the draws of `ops.dropout.keep_mask`, by global key."""
        assert self.rng_keys_BHt is not None and self.key_index is not None
        first, device = self.head_offset, self.rng_keys_BHt.device
        heads = torch.arange(first, first + num_heads, device=device)
        keys_BHT = rng.fold(self.rng_keys_BHt, heads[:, None])
        draws = rng.bits(rng.fold(keys_BHT[..., None], self.key_index), _NUM_BITS)
        return draws >= round(self.dropout_p * (1 << _NUM_BITS))


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold another block's output (BHTK) and log-sum-exp (BHT) into the first pair, in place."""
    total = torch.logaddexp(lse, part_lse)
    known = total > -math.inf  # a row that sees nothing yet stays zero
    old = torch.where(known, (lse - total).exp(), 0.0)
    new = torch.where(known, (part_lse - total).exp(), 0.0)
    out.mul_(old[..., None]).add_(part.to(out.dtype) * new[..., None])
    lse.copy_(total)


def merge_sinks(out: Tensor, lse: Tensor, sinks_H: Tensor) -> None:
    """`merge` with a sink a head, whose output is zero, in place."""
    sink_H1 = sinks_H.to(lse.dtype)[:, None]
    total = torch.logaddexp(lse, sink_H1)
    out.mul_((lse - total).exp()[..., None].to(out.dtype))
    lse.copy_(total)


def grad_of_sinks(grad: Tensor, out: Tensor, lse: Tensor, sinks_H: Tensor) -> Tensor:
    """Of merged outputs and log-sum-exps: every query's weight of a sink moves them to zero."""
    weight_BHT = (sinks_H.to(lse.dtype)[:, None] - lse).exp()
    mean_BHT = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(weight_BHT * mean_BHT).sum(dim=(0, 2)).to(sinks_H.dtype)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, block: Block
    ) -> Tensor:
        out, lse = forward(q, k, v, block)
        if sinks_H is not None:
            merge_sinks(out, lse, sinks_H)
        ctx.save_for_backward(q, k, v, sinks_H, out, lse)
        ctx.block = block
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks_H, out, lse = ctx.saved_tensors
        grads = backward(grad, q, k, v, out, lse, ctx.block)
        of_sinks = None if sinks_H is None else grad_of_sinks(grad, out, lse, sinks_H)
        return *(g.to(q.dtype) for g in grads), of_sinks, None


def attend(q: Tensor, k: Tensor, v: Tensor, block: Block, sinks_H: Tensor | None) -> Tensor:
    """Attention (BHTK) over one block that is everything, with gradients.

    Scores of all queries and keys are there at once, a layer at a time, where no kernel serves.
    """
    return _Attend.apply(q, k, v, sinks_H, block)  # type: ignore[no-any-return]


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """(output BHTK, log-sum-exp BHT in fp32 at least; -inf and 0 where a query sees nothing)."""
    if not _fused(q, block):
        return _explicit_forward(q, k, v, block)
    if cpu_attention.serves(q):
        pair: tuple[Tensor, Tensor] = cpu_attention.attend(
            q, k, v, block.allowed_B1TS, block.is_causal
        )
        return pair
    q, k, v = _by_rows(q, k, v)
    if q.is_cuda:
        found = _aten._scaled_dot_product_flash_attention(
            q, *_repeat(q, k, v), 0.0, block.is_causal
        )
        return found[0], found[1]
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, block.is_causal, attn_mask=_bias(q, block)
    )
    if block.allowed_B1TS is not None:
        blind = ~block.allowed_B1TS.any(dim=-1).expand(lse.shape)
        lse = lse.masked_fill(blind, -math.inf)
        out = out.masked_fill(blind[..., None], 0.0)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v that this block contributes; ``out`` and ``lse`` are merged."""
    # Log-sum-exps of the kernels are fp32 (fp64 for fp64); rows that see nothing have none.
    if not _fused(q, block) or q.is_cuda:
        return _explicit_backward(grad, q, k, v, out, lse, block)
    if cpu_attention.serves(q):
        mask = (block.allowed_B1TS, block.is_causal)
        mine: tuple[Tensor, Tensor, Tensor] = cpu_attention.attend_backward(
            grad, q, k, v, out, lse, *mask
        )
        return mine
    q, k, v = _by_rows(q, k, v)
    empty = lse == -math.inf
    if bool(empty.any()):
        lse = lse.masked_fill(empty, 0.0)
        grad = grad.masked_fill(empty[..., None], 0.0)
    grads: tuple[Tensor, Tensor, Tensor] = (
        _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.contiguous(),
            q,
            k,
            v,
            out.contiguous(),
            lse.contiguous(),
            0.0,
            block.is_causal,
            attn_mask=_bias(q, block),
        )
    )
    return grads


def _fused(q: Tensor, block: Block) -> bool:
    """Whether there is a kernel that returns the log-sum-exp for this block.

    None knows dropout by our keys, or a soft cap. CUDA's takes 16-bit heads of a width up to 256 in
    steps of 8: `scaled_dot_product_attention` would pad them, the kernel itself refuses. Of other
    devices' kernels nothing is known.
    """
    if block.drops or block.soft_cap is not None:
        return False
    if not q.is_cuda:
        return bool(q.is_cpu)
    width, is_half = q.shape[-1], q.dtype in (torch.bfloat16, torch.float16)
    return block.allowed_B1TS is None and is_half and width % 8 == 0 and width <= 256


def _by_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Heads side by side in memory: the CPU kernel misreads anything else, without an error."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _bias(q: Tensor, block: Block) -> Tensor | None:
    if block.allowed_B1TS is None:
        return None
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    return torch.where(block.allowed_B1TS, zero, -math.inf)


def _repeat(q: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in heads)


def _scores(q: Tensor, k: Tensor, block: Block) -> tuple[Tensor, Tensor | None]:
    """Masked, scaled and capped scores (BHTS), fp32 at least, and the slope of a cap."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.transpose(-1, -2)).to(wide) / math.sqrt(q.shape[-1])
    slope = None
    if block.soft_cap is not None:
        turned = torch.tanh(scores / block.soft_cap)
        scores, slope = turned * block.soft_cap, 1.0 - turned.square()
    allowed = block.allowed_B1TS
    if block.is_causal:
        index = torch.arange(q.shape[2], device=q.device)
        allowed = index[:, None] >= index
    return scores if allowed is None else scores.masked_fill(~allowed, -math.inf), slope


def _explicit_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    k, v = _repeat(q, k, v)
    scores, _ = _scores(q, k, block)
    lse = torch.logsumexp(scores, dim=-1)
    weights = (scores - lse[..., None]).exp()
    weights = torch.where(lse[..., None] > -math.inf, weights, 0.0)
    if block.drops:
        keep = block.keep(q.shape[1])
        weights = torch.where(keep, weights / (1.0 - block.dropout_p), 0.0)
    return weights.to(q.dtype) @ v, lse


def _explicit_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    num_kv = k.shape[1]
    k, v = _repeat(q, k, v)
    wide = lse.dtype
    scores, slope = _scores(q, k, block)
    weights = (scores - lse[..., None]).exp()
    del scores  # as large as all of these are
    weights = torch.where(lse[..., None] > -math.inf, weights, 0.0)
    grad_weights = (grad @ v.transpose(-1, -2)).to(wide)
    used = weights
    if block.drops:
        keep = block.keep(q.shape[1])
        used = torch.where(keep, weights / (1.0 - block.dropout_p), 0.0)
        grad_weights = torch.where(keep, grad_weights / (1.0 - block.dropout_p), 0.0)
    grad_v = used.to(q.dtype).transpose(-1, -2) @ grad
    mean = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    grad_scores = weights * (grad_weights - mean)
    if slope is not None:
        grad_scores = grad_scores * slope
    grad_scores = grad_scores.to(q.dtype) / math.sqrt(q.shape[-1])
    grad_k = grad_scores.transpose(-1, -2) @ q
    shape = (k.shape[0], num_kv, -1, *k.shape[2:])
    return grad_scores @ k, grad_k.view(shape).sum(2), grad_v.view(shape).sum(2)
