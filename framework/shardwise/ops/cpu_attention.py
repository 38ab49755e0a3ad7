"""Attention on CPU by `cpu_attention.cpp`, as an operator with gradients.

Flash attention (Dao et al., 2022, algorithms 1 and 4). Beside PyTorch's own kernel it sums in fp32
for bf16 too, takes a mask of bools and skips what no query of a block sees, and keeps no copies:
results and gradients lie as (B, T, H, K), as the products around them want them.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from shardwise.ops import compiled

# Shape suffixes: B sequences, T queries, S keys, H query heads, G key/value heads, K head width.

MAX_HEAD_WIDTH = 256
MIN_QUERIES = 16  # fewer are for kernels that decode


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel. Raises `compiled.CannotBuildError`."""
    return compiled.load(Path(__file__).with_name("cpu_attention.cpp"))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the kernel can be built here."""
    return compiled.unusable(library) is None


def serves(q_BHTK: Tensor) -> bool:
    """Whether these queries are for this kernel."""
    width = q_BHTK.shape[3]
    fits = width % 16 == 0 and width <= MAX_HEAD_WIDTH and q_BHTK.shape[2] >= MIN_QUERIES
    known = q_BHTK.is_cpu and q_BHTK.dtype in (torch.float32, torch.bfloat16)
    return known and fits and available()


@torch.library.custom_op("shardwise::cpu_attention", mutates_args=())
def attend(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, allowed_B1TS: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """(output BHTK, log-sum-exp BHT in fp32); 0 and -inf where a query sees nothing.

    H is a multiple of G. ``allowed_B1TS``: bool, true = visible, first dimension B or 1;
    ``is_causal``: query t sees the keys up to t.
    """
    q, k, v = (_by_rows(x) for x in (q_BHTK, k_BGSK, v_BGSK))
    out, lse = _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _call("attention_forward", allowed_B1TS, is_causal, lse, q, k, v, out)
    return out, lse


@torch.library.custom_op("shardwise::cpu_attention_backward", mutates_args=())
def attend_backward(
    grad_BHTK: Tensor,
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    out_BHTK: Tensor,
    lse_BHT: Tensor,
    allowed_B1TS: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; of a block of the keys, when ``out`` and ``lse`` are merged ones."""
    grad, q, k, v, out = (_by_rows(x) for x in (grad_BHTK, q_BHTK, k_BGSK, v_BGSK, out_BHTK))
    grads = (_empty_like(q), _empty_like(k), _empty_like(v))
    lse = lse_BHT.contiguous()
    _call("attention_backward", allowed_B1TS, is_causal, lse, q, k, v, out, grad, *grads)
    return grads


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attend_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    allowed: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:  # type: ignore[type-arg]
    *qkv, allowed, is_causal = inputs
    ctx.save_for_backward(*qkv, *output, allowed)
    ctx.is_causal = is_causal  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    q, k, v, out, lse, allowed = ctx.saved_tensors  # type: ignore[attr-defined]
    is_causal: bool = ctx.is_causal  # type: ignore[attr-defined]
    return *attend_backward(grad, q, k, v, out, lse, allowed, is_causal), None, None


attend.register_autograd(_backward, setup_context=_setup)


def _empty_like(x_BHTK: Tensor) -> Tensor:
    batch, heads, tokens, width = x_BHTK.shape
    return x_BHTK.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(
    name: str, allowed: Tensor | None, is_causal: bool, lse: Tensor, q: Tensor, *rest: Tensor
) -> None:
    """``rest``: k, v, out, and of the backward pass grad, dq, dk, dv; see `Problem` in C++."""
    k = rest[0]
    (batch, heads, queries, width), (_, groups, keys, _) = q.shape, k.shape
    if heads % groups or any(x.dtype != q.dtype for x in rest):
        raise ValueError(f"{heads} heads of {q.dtype} with {groups} of {k.dtype}")
    mask = (0, 0, 0)
    if allowed is not None:
        allowed = _by_rows(allowed)
        fits = len(allowed) in (1, batch) and allowed.shape[1:] == (1, queries, keys)
        if allowed.dtype != torch.bool or not fits:
            raise ValueError(
                f"a mask of {allowed.dtype} {tuple(allowed.shape)} for {queries} queries and "
                f"{keys} keys"
            )
        mask = (allowed.data_ptr(), allowed.stride(0) * (len(allowed) > 1), allowed.stride(2))
    views = [(x.data_ptr(), *x.stride()[:3]) for x in (q, *rest)]
    views += [(0, 0, 0, 0)] * (8 - len(views))
    threads = min(torch.get_num_threads(), batch * groups)
    problem = [
        *(batch, heads, groups, queries, keys, width),
        *(q.dtype == torch.bfloat16, is_causal, threads),
        *mask,
        *(number for view in views for number in view),
        lse.data_ptr(),
    ]
    if math.prod(q.shape) * keys:
        getattr(library(), name)((ctypes.c_int64 * len(problem))(*problem))
