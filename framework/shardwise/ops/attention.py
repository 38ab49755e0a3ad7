"""Causal attention: flash-attn, our kernel on CPU, else PyTorch's; explicit math for dropout.

What a token may see is decided once per forward pass (`causal_mask`) and passed to every layer.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops import attention_blocks, cpu_attention, flash, rng
from shardwise.ops.dropout import keep_mask

# Shape suffixes: B sequences, T queries, S keys, H query heads, G key/value heads, K head width.

BRANCH_SHIFT = 32  # segment id = document + (branch << BRANCH_SHIFT); branch 0 is the trunk
PADDING = (1 << BRANCH_SHIFT) - 1  # the segment id of what fills a row up: no document's number


@dataclasses.dataclass(frozen=True)
class Mask:
    """What every query may attend to.

    With neither ``allowed_B1TS`` nor ``cu_seqlens`` the mask is plainly causal with T == S.
    ``allowed_B1TS`` (bool, true = visible; first dimension B or 1) says it all when present.
    ``cu_seqlens`` (int32) and ``window`` are its short form for flash-attn.
    """

    allowed_B1TS: Tensor | None = None
    cu_seqlens: Tensor | None = None
    window: int | None = None
    flash: bool = False


def causal_mask(
    position_ids_BT: Tensor,
    dtype: torch.dtype,
    segment_ids_BT: Tensor | None = None,
    window: int | None = None,
    host_segment_ids_BT: Tensor | None = None,
) -> Mask:
    """The mask of one forward pass with activations of ``dtype``.

    Tokens see earlier tokens of their own segment (and, in a branch, of its trunk: segment ids
    hold the branch above bit `BRANCH_SHIFT`, see `data.groups`), and at most ``window`` of them,
    themselves included; the window is measured in ``position_ids_BT``. With flash-attn, segments
    must be contiguous, as packing makes them; where they begin, and whether there are branches, is
    read off ``host_segment_ids_BT``, if the host has them, and else the device is waited for.
    """
    num_tokens, device = position_ids_BT.shape[1], position_ids_BT.device
    if window is not None and window >= num_tokens:
        window = None
    # flash-attn knows documents one after another, not branches.
    known_BT = segment_ids_BT if host_segment_ids_BT is None else host_segment_ids_BT
    if flash.unusable(device, dtype) is None and not has_branches(known_BT):
        starts = _cu_seqlens(known_BT)
        starts = None if starts is None else starts.to(device, non_blocking=True)
        return Mask(cu_seqlens=starts, window=window, flash=True)
    if segment_ids_BT is None and window is None:
        return Mask()
    index_T = torch.arange(num_tokens, device=device)
    allowed = allowed_by_position(index_T[None], index_T)
    if window is not None:
        # Not by index: a branch stands further from its trunk in the row than in its sequence.
        at_BT = position_ids_BT
        allowed = allowed & (at_BT[:, None, :, None] - at_BT[:, None, None, :] < window)
    if segment_ids_BT is not None:
        allowed = allowed & visible(segment_ids_BT[:, None, :, None], segment_ids_BT[:, None, None])
    return Mask(allowed_B1TS=allowed)


def visible(query: Tensor, key: Tensor) -> Tensor:
    """Bool, broadcast: the key is of the query's own segment, or of the trunk it branches from."""
    same_document = ((query ^ key) & ((1 << BRANCH_SHIFT) - 1)) == 0
    return same_document & ((query == key) | ((key >> BRANCH_SHIFT) == 0))


def has_branches(segment_ids_BT: Tensor | None) -> bool:
    """Whether some segment branches from another (asks the device)."""
    return segment_ids_BT is not None and bool((segment_ids_BT >> BRANCH_SHIFT).any())


def allowed_by_position(query_BT: Tensor, key_S: Tensor, window: int | None = None) -> Tensor:
    """Bool B1TS: key position <= query position, and less than ``window`` behind it."""
    ahead = query_BT[:, None, :, None] - key_S
    allowed = ahead >= 0
    return allowed if window is None else allowed & (ahead < window)


def _cu_seqlens(segment_ids_BT: Tensor | None) -> Tensor | None:
    """Start of every segment in the flattened batch, and its end (int32)."""
    if segment_ids_BT is None:
        return None
    starts_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts = starts_BT.flatten().nonzero().flatten().to(torch.int32)
    return F.pad(starts, (0, 1), value=segment_ids_BT.numel())


def attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask: Mask,
    *,
    dropout_p: float = 0.0,
    rng_keys_BT: Tensor | None = None,
    salt: int = 0,
    head_offset: int = 0,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention (BHTK), H a multiple of G (grouped-query attention).

    With ``soft_cap``, scores become ``cap * tanh(scores / cap)`` (Gemma 2); ``sinks_H`` are scores
    of a key that no value belongs to (gpt-oss). Kernels that return no log-sum-exp, or know no cap,
    are not asked then.

    Dropout of the attention weights happens when ``rng_keys_BT`` is given and ``dropout_p > 0``;
    then the explicit path runs: no fused kernel draws from our keys. ``salt`` tells dropout sites
    apart; ``head_offset`` is the global index of the first query head, for a rank that holds some.
    """
    drops = rng_keys_BT is not None and dropout_p > 0.0
    if soft_cap is not None or sinks_H is not None:
        if drops:
            raise ValueError("attention: no dropout of weights beside a soft cap or sinks")
        allowed = mask.allowed_B1TS
        if mask.flash:
            allowed = _dense(mask, q_BHTK, q_BHTK.shape[2], k_BGSK.shape[2])
        everything = slice(None)
        block = attention_blocks.Block(
            everything, everything, allowed, allowed is None, soft_cap=soft_cap
        )
        return attention_blocks.attend(q_BHTK, k_BGSK, v_BGSK, block, sinks_H)
    if drops and rng_keys_BT is not None:
        rng_keys_BT = rng.fold(rng_keys_BT, salt)
        return _explicit(q_BHTK, k_BGSK, v_BGSK, mask, dropout_p, rng_keys_BT, head_offset)
    if mask.flash:
        if q_BHTK.shape[3] <= flash.MAX_HEAD_WIDTH:
            return flash.attention(q_BHTK, k_BGSK, v_BGSK, mask.cu_seqlens, mask.window)
        # A mask is made without knowing how wide the heads are.
        mask = Mask(_dense(mask, q_BHTK, q_BHTK.shape[2], k_BGSK.shape[2]))
    allowed, is_causal = mask.allowed_B1TS, mask.allowed_B1TS is None
    if cpu_attention.serves(q_BHTK):
        out_BHTK: Tensor = cpu_attention.attend(q_BHTK, k_BGSK, v_BGSK, allowed, is_causal)[0]
        return out_BHTK
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        attn_mask=allowed,
        is_causal=is_causal,
        enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
    )


def _explicit(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask: Mask,
    dropout_p: float,
    rng_keys_BT: Tensor,
    head_offset: int,
) -> Tensor:
    num_heads, num_queries, num_keys = q_BHTK.shape[1], q_BHTK.shape[2], k_BGSK.shape[2]
    repeats = num_heads // k_BGSK.shape[1]
    k_BHSK = k_BGSK.repeat_interleave(repeats, dim=1)
    v_BHSK = v_BGSK.repeat_interleave(repeats, dim=1)
    wide = torch.float64 if q_BHTK.dtype == torch.float64 else torch.float32
    scores = (q_BHTK @ k_BHSK.transpose(-1, -2)).to(wide) / math.sqrt(q_BHTK.shape[-1])
    scores = scores.masked_fill(~_dense(mask, q_BHTK, num_queries, num_keys), -math.inf)
    heads_H = torch.arange(head_offset, head_offset + num_heads, device=q_BHTK.device)
    keys_BHT = rng.fold(rng_keys_BT[:, None, :], heads_H[:, None])
    keep_BHTS = keep_mask(keys_BHT, num_keys, dropout_p)
    weights = torch.softmax(scores, dim=-1)
    weights = torch.where(keep_BHTS, weights / (1.0 - dropout_p), 0.0)
    return weights.to(q_BHTK.dtype) @ v_BHSK


def _dense(mask: Mask, q_BHTK: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """The boolean form of any mask."""
    if mask.allowed_B1TS is not None:
        return mask.allowed_B1TS
    index_S = torch.arange(num_keys, device=q_BHTK.device)
    allowed = allowed_by_position(index_S[None, num_keys - num_queries :], index_S, mask.window)
    if mask.cu_seqlens is None:
        return allowed
    flat = torch.arange(q_BHTK.shape[0] * num_keys, device=q_BHTK.device, dtype=torch.int32)
    document_BS = torch.bucketize(flat, mask.cu_seqlens, right=True).view(-1, num_keys)
    return allowed & (document_BS[:, None, :, None] == document_BS[:, None, None, :])
