"""Softmax of logits on CPU by `cpu_softmax.cpp`: what cross-entropy and its gradient ask for.

PyTorch's operators would read and write a copy of the logits in fp32 several times.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from shardwise.ops import compiled

# Shape suffixes: N rows, V vocabulary.


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel. Raises `compiled.CannotBuildError`."""
    return compiled.load(Path(__file__).with_name("cpu_softmax.cpp"))


def serves(logits_NV: Tensor) -> bool:
    """Whether these logits are for this kernel."""
    known = logits_NV.is_cpu and logits_NV.dtype in (torch.float32, torch.bfloat16)
    return known and logits_NV.stride(1) == 1 and compiled.unusable(library) is None


def statistics(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Maximum of ``z = logits / temperature``, and the sum of ``exp(z - maximum)`` (N, fp32)."""
    top_N, total_N = logits_NV.new_empty((2, len(logits_NV)), dtype=torch.float32)
    outputs = (top_N.data_ptr(), total_N.data_ptr(), 0, 0, 0, 0, 0, 0)
    _call("softmax_statistics", logits_NV, temperature, outputs)
    return top_N, total_N


def gradient(
    logits_NV: Tensor,
    temperature: float,
    lse_N: Tensor,
    weight_N: Tensor,
    column_N: Tensor,
    hit_N: Tensor,
) -> Tensor:
    """``onehot(column) * hit - exp(z - lse) * weight``, in the logits' dtype."""
    grad_NV = torch.empty_like(logits_NV)
    inputs = [t.contiguous() for t in (lse_N, weight_N, hit_N, column_N)]
    assert [t.dtype for t in inputs] == [torch.float32] * 3 + [torch.int64]
    pointers = [t.data_ptr() for t in inputs]
    outputs = (0, 0, *pointers, grad_NV.data_ptr(), grad_NV.stride(0))
    _call("softmax_gradient", logits_NV, temperature, outputs)
    return grad_NV


def _call(name: str, logits_NV: Tensor, temperature: float, rest: tuple[int, ...]) -> None:
    """``rest``: what follows the logits in `Rows` of the source."""
    rows = [
        *logits_NV.shape,
        logits_NV.dtype == torch.bfloat16,
        torch.get_num_threads(),
        logits_NV.data_ptr(),
        logits_NV.stride(0),
        *rest,
    ]
    scale = ctypes.c_float(1.0 / temperature)
    getattr(library(), name)((ctypes.c_int64 * len(rows))(*rows), scale)
