"""The one place that imports flash-attn (Dao 2023), and says why when it cannot be used."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

# Shape suffixes: B sequences, T queries, S keys, H query heads, G key/value heads, K head width.

MAX_HEAD_WIDTH = 256
NEEDS = (8, 0)  # compute capability


@functools.cache
def _library() -> tuple[Any, str]:
    """The imported module, or None and why not."""
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    try:
        return importlib.import_module("flash_attn"), ""
    except ImportError as error:
        return None, f"flash-attn cannot be imported ({error}); pip install 'shardwise[gpu]'"


def unusable(device: torch.device, dtype: torch.dtype, head_width: int = 0) -> str | None:
    """None when flash-attn will compute attention for such activations, else the reason."""
    if device.type != "cuda":
        return f"flash-attn runs on CUDA only, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn computes in bf16 and fp16 only, not in {dtype}"
    if head_width > MAX_HEAD_WIDTH:
        return f"flash-attn computes heads up to {MAX_HEAD_WIDTH} wide, and these have {head_width}"
    library, reason = _library()
    if library is None:
        return reason
    if (found := torch.cuda.get_device_capability(device)) < NEEDS:
        return (
            f"flash-attn needs a GPU of compute capability {NEEDS[0]}.{NEEDS[1]} or more; "
            f"this one has {found[0]}.{found[1]}"
        )
    return None


def attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    cu_seqlens: Tensor | None,
    window: int | None,
) -> Tensor:
    """Causal attention (BHTK); ``cu_seqlens`` keeps packed documents apart."""
    library, reason = _library()
    assert library is not None, reason
    q, k, v = (x.transpose(1, 2) for x in (q_BHTK, k_BGSK, v_BGSK))
    reach = (-1, -1) if window is None else (window - 1, 0)
    if cu_seqlens is None:
        out = library.flash_attn_func(q, k, v, causal=True, window_size=reach)
        return out.transpose(1, 2)  # type: ignore[no-any-return]
    num_rows, num_tokens = q.shape[:2]
    out = library.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=num_tokens,  # an upper bound, so that shapes stay static
        max_seqlen_k=num_tokens,
        causal=True,
        window_size=reach,
    )
    return out.unflatten(0, (num_rows, num_tokens)).transpose(1, 2)  # type: ignore[no-any-return]
