"""The quantisers of `ops.fp8` by our Triton kernels on a GPU, and the reason where they are not.

They compute the reference's numbers, bit for bit, in one pass over the tensor.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from shardwise.ops import compile_caches


@functools.cache
def _kernels() -> tuple[Any, str]:
    """The imported kernels, or None and why not."""
    compile_caches.secure()
    try:
        return importlib.import_module("shardwise_kernels.quantize"), ""
    except ImportError as error:
        return None, f"Triton cannot be imported ({error}); it comes with CUDA builds of torch"


def unusable(device: torch.device) -> str | None:
    """None when the kernels quantise tensors on ``device``, else the reason."""
    if device.type != "cuda":
        return f"Triton's kernels run on CUDA only, not on {device.type}"
    if (found := torch.cuda.get_device_capability(device)) < (8, 9):
        return f"FP8 casts need compute capability 8.9, this GPU has {found[0]}.{found[1]}"
    return _kernels()[1] or None


def kernels() -> Any:
    """`shardwise_kernels.quantize`; ask `unusable` first."""
    found, reason = _kernels()
    assert found is not None, reason
    return found
