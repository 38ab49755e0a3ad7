"""Context parallelism: attention over a sequence that several ranks hold in parts.

``ring`` (Liu et al. 2023, "Ring Attention with Blockwise Transformers"): keys and values travel
round the ranks while each computes with the block that it has; the parts of a softmax are merged by
their log-sum-exp. Ranks hold two chunks each, one from either end, so that causal work is even
(zig-zag, as in Megatron's and Llama 3's context parallelism). ``ulysses`` (Jacobs et al. 2023,
"DeepSpeed Ulysses"): two all-to-alls change a cut along the tokens into one along the heads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.ops import attention as plain
from shardwise.ops import attention_blocks, comm, rng
from shardwise.ops.attention_blocks import Block
from shardwise.parallel.layout import Layout

# Shape suffixes: B sequences, T tokens, t tokens of this rank, H query heads, G key/value heads,
# K head width.

AXIS = "cp"


# --- who holds which tokens ---------------------------------------------------------------------


def multiple_of(size: int, kind: str) -> int:
    """What the number of tokens must be a multiple of."""
    return 2 * size if kind == "ring" else size


def tokens_multiple(layout: Layout) -> int:
    """What the number of tokens must be a multiple of."""
    pieces = multiple_of(layout.cp, layout.cp_kind) if layout.cp > 1 else 1
    # Sequence parallelism cuts what context parallelism leaves.
    return math.lcm(pieces, layout.cp * (layout.tp if layout.sp else 1))


def token_index(
    num_tokens: int, size: int, rank: int, kind: str, device: torch.device | str = "cpu"
) -> Tensor:
    """Global indices (int64, ascending) of the tokens of rank ``rank`` of ``size``.

    A ring's ranks hold chunk ``rank`` and its mirror image of 2 * size chunks. Raises ValueError
    if the tokens do not divide.
    """
    if num_tokens % multiple_of(size, kind):
        raise ValueError(
            f"{num_tokens} tokens are not a multiple of {multiple_of(size, kind)}, which "
            f"cp{size} {kind} needs"
        )
    if kind == "ulysses":
        return torch.arange(num_tokens, device=device).view(size, -1)[rank]
    chunks = torch.arange(num_tokens, device=device).view(2 * size, -1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def _order(num_tokens: int, size: int, kind: str, device: torch.device) -> Tensor:
    """Where each global token stands in the ranks' parts laid side by side."""
    ranks = [token_index(num_tokens, size, r, kind, device) for r in range(size)]
    return torch.cat(ranks).argsort()


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup, kind: str) -> Tensor:
        ctx.dim, ctx.group, ctx.kind = dim, group, kind
        size = group.size()
        first = x.movedim(dim, 0).contiguous()
        out = first.new_empty((size * first.shape[0], *first.shape[1:]))
        comm.all_gather(out, first, group, AXIS).wait()
        order = _order(out.shape[0], size, kind, x.device)
        return out[order].movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        group = ctx.group
        place = (group.size(), group.rank(), ctx.kind, grad.device)
        index = token_index(grad.shape[ctx.dim], *place)
        return grad.index_select(ctx.dim, index), None, None, None


def gather_tokens(x: Tensor, dim: int, group: dist.ProcessGroup, kind: str) -> Tensor:
    """A per-token tensor of all ranks, in global order.

    The gradient is this rank's slice, unreduced: every rank computes the same loss from the
    gathered tensor, and that loss is counted once.
    """
    return _GatherTokens.apply(x, dim, group, kind)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class ContextMask:
    """Who sees whom, for all tokens; see `ops.attention.causal_mask` for the meaning."""

    index_t: Tensor  # global indices of this rank's tokens
    segment_ids_BT: Tensor | None
    position_ids_BT: Tensor
    window: int | None = None

    @property
    def reach(self) -> int | None:
        """The window; None where it holds every token, as in `ops.attention.causal_mask`."""
        num_tokens = self.position_ids_BT.shape[1]
        return None if self.window is None or self.window >= num_tokens else self.window

    @property
    def is_causal(self) -> bool:
        """Whether order alone decides."""
        return self.segment_ids_BT is None and self.reach is None

    def allowed(self, query_t: Tensor, key_t: Tensor) -> Tensor:
        """Bool B1TS for queries and keys with these global indices."""
        allowed = plain.allowed_by_position(query_t[None], key_t)
        if self.reach is not None:
            at = self.position_ids_BT
            ahead = at[:, query_t][:, None, :, None] - at[:, key_t][:, None, None, :]
            allowed = allowed & (ahead < self.reach)
        if self.segment_ids_BT is not None:
            segments = self.segment_ids_BT
            query, key = segments[:, query_t], segments[:, key_t]
            allowed = allowed & plain.visible(query[:, None, :, None], key[:, None, None])
        return allowed


class ContextAttention:
    """Stands in for `ops.attention.attention` where the tokens are cut.

    A graph break under `torch.compile`: what travels between ranks while a block is computed is
    not the compiler's to order.
    """

    def __init__(self, group: dist.ProcessGroup, kind: str) -> None:
        self.run = ring_attention if kind == "ring" else ulysses_attention
        self.group = group

    @torch.compiler.disable
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: ContextMask, **options: Any
    ) -> Tensor:
        """See `ring_attention`."""
        return self.run(q, k, v, mask, group=self.group, **options)


# --- ring ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Ring:
    """One attention call's constants, and which block meets which part of the queries."""

    mask: ContextMask
    group: dist.ProcessGroup
    dropout_p: float
    rng_keys_Bt: Tensor | None  # of this rank's queries, folded with the place's salt
    head_offset: int
    soft_cap: float | None

    def block(self, owner: int) -> Block | None:
        """What this rank's queries do with the keys of rank ``owner``; None: nothing.

        Of an earlier rank's keys, causal order shows all queries the first half alone; of a later
        one's, the second half of the queries sees all. Both are whole rectangles.
        """
        rank, half = self.group.rank(), self.mask.index_t.shape[0] // 2
        everything = slice(0, 2 * half)
        size, total = self.group.size(), self.mask.position_ids_BT.shape[1]
        rows, columns = everything, everything
        if owner < rank:
            columns = slice(0, half)
        elif owner > rank:
            rows = slice(half, 2 * half)
        query_t = self.mask.index_t[rows]
        key_t = token_index(total, size, owner, "ring", query_t.device)[columns]
        allowed = None
        if not self.mask.is_causal:
            allowed = self.mask.allowed(query_t, key_t)
            # To ask a device is to wait for it, in every layer: it computes what sees nothing, too.
            if allowed.is_cpu and not bool(allowed.any()):
                return None
        keys_BHt = None
        if self.rng_keys_Bt is not None:
            keys_BHt = self.rng_keys_Bt[:, None, rows]
        return Block(
            rows,
            columns,
            allowed,
            is_causal=allowed is None and owner == rank,
            dropout_p=self.dropout_p,
            rng_keys_BHt=keys_BHt,
            key_index=key_t,
            head_offset=self.head_offset,
            soft_cap=self.soft_cap,
        )


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, ring: _Ring
    ) -> Tensor:
        group = ring.group
        rank, size = group.rank(), group.size()
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:-1], -math.inf, dtype=wide, device=q.device)
        held = [k, v]
        for step in range(size):
            # The next block is on its way while this one is computed.
            coming = comm.ring_shift(held, group, AXIS) if step < size - 1 else None
            block = ring.block((rank - step) % size)
            if block is not None:
                columns = block.columns
                part = attention_blocks.forward(
                    q[:, :, block.rows], held[0][:, :, columns], held[1][:, :, columns], block
                )
                attention_blocks.merge(out[:, :, block.rows], lse[:, :, block.rows], *part)
            if coming is not None:
                held = coming.wait()
        if sinks_H is not None:
            attention_blocks.merge_sinks(out, lse, sinks_H)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks_H, result, lse)
        ctx.ring = ring
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks_H, out, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        group = ring.group
        rank, size = group.rank(), group.size()
        wide = lse.dtype
        grad_q = torch.zeros(q.shape, dtype=wide, device=q.device)
        held = [k, v]
        # Gradients of keys and values travel with them, one step behind, and end at home.
        grads = [torch.zeros(t.shape, dtype=wide, device=q.device) for t in held]
        for step in range(size):
            coming = comm.ring_shift(held, group, AXIS) if step < size - 1 else None
            moving = comm.ring_shift(grads, group, AXIS) if step > 0 else None
            block = ring.block((rank - step) % size)
            parts = None
            if block is not None:
                rows, columns = block.rows, block.columns
                parts = attention_blocks.backward(
                    grad[:, :, rows],
                    q[:, :, rows],
                    held[0][:, :, columns],
                    held[1][:, :, columns],
                    out[:, :, rows],
                    lse[:, :, rows],
                    block,
                )
            if moving is not None:
                grads = moving.wait()
            if block is not None and parts is not None:
                grad_q[:, :, block.rows] += parts[0]
                grads[0][:, :, block.columns] += parts[1]
                grads[1][:, :, block.columns] += parts[2]
            if coming is not None:
                held = coming.wait()
        if size > 1:  # a rank cannot send to itself
            grads = comm.ring_shift(grads, group, AXIS).wait()
        of_sinks = None
        if sinks_H is not None:
            of_sinks = attention_blocks.grad_of_sinks(grad, out, lse, sinks_H)
        return grad_q.to(q.dtype), grads[0].to(k.dtype), grads[1].to(v.dtype), of_sinks, None


def ring_attention(
    q_BHtK: Tensor,
    k_BGtK: Tensor,
    v_BGtK: Tensor,
    mask: ContextMask,
    *,
    group: dist.ProcessGroup,
    dropout_p: float = 0.0,
    rng_keys_BT: Tensor | None = None,
    salt: int = 0,
    head_offset: int = 0,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """`ops.attention.attention` (BHtK) of this rank's queries over all ranks' keys.

    The backward pass treats each block with the merged output and log-sum-exp (Dao 2023,
    "FlashAttention-2", algorithm 2): autograd through the merge would lose what a block's weights
    owe to the other blocks. ``rng_keys_BT`` holds the keys of this rank's queries.
    """
    dropped = rng_keys_BT is not None and dropout_p > 0.0
    rng_keys_Bt = rng.fold(rng_keys_BT, salt) if rng_keys_BT is not None and dropped else None
    ring = _Ring(mask, group, dropout_p if dropped else 0.0, rng_keys_Bt, head_offset, soft_cap)
    return _RingAttention.apply(q_BHtK, k_BGtK, v_BGtK, sinks_H, ring)  # type: ignore[no-any-return]


# --- ulysses ------------------------------------------------------------------------------------


class _Exchange(torch.autograd.Function):
    """Cut one dimension among the ranks, and join another: an all-to-all, its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.cut, ctx.join, ctx.group = cut, join, group
        size = group.size()
        sent = torch.stack(x.chunk(size, dim=cut))
        received = torch.empty_like(sent)
        comm.all_to_all(received, sent, group, AXIS).wait()
        return torch.cat(received.unbind(), dim=join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _Exchange.apply(grad, ctx.join, ctx.cut, ctx.group), None, None, None


def ulysses_attention(
    q_BHtK: Tensor,
    k_BGtK: Tensor,
    v_BGtK: Tensor,
    mask: ContextMask,
    *,
    group: dist.ProcessGroup,
    dropout_p: float = 0.0,
    rng_keys_BT: Tensor | None = None,
    salt: int = 0,
    head_offset: int = 0,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """`ring_attention`'s result by two all-to-alls. Key/value heads that the ranks do not divide
    are repeated just enough. Raises ValueError when the ranks do not divide the query heads.
    """
    size = group.size()
    num_heads, num_kv = q_BHtK.shape[1], k_BGtK.shape[1]
    if num_heads % size:
        raise ValueError(f"ulysses: {size} ranks do not divide {num_heads} query heads")
    repeats = math.lcm(num_kv, size) // num_kv
    if repeats > 1:
        k_BGtK = k_BGtK.repeat_interleave(repeats, dim=1)
        v_BGtK = v_BGtK.repeat_interleave(repeats, dim=1)
    q, k, v = (_Exchange.apply(x, 1, 2, group) for x in (q_BHtK, k_BGtK, v_BGtK))
    if sinks_H is not None:
        sinks_H = sinks_H.chunk(size)[group.rank()]
    if rng_keys_BT is not None and dropout_p > 0.0:
        rng_keys_BT = gather_tokens(rng_keys_BT, 1, group, "ulysses")
    out = plain.attention(
        q,
        k,
        v,
        plain.causal_mask(mask.position_ids_BT, q.dtype, mask.segment_ids_BT, mask.window),
        dropout_p=dropout_p,
        rng_keys_BT=rng_keys_BT,
        salt=salt,
        head_offset=head_offset + group.rank() * (num_heads // size),
        soft_cap=soft_cap,
        sinks_H=sinks_H,
    )
    return _Exchange.apply(out, 2, 1, group)  # type: ignore[no-any-return]
