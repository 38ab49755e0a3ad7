"""The one place that imports bitsandbytes (Dettmers et al. 2023), and says why when it cannot.

Weights are quantised by our own code in `nf4` and `int8`, which gives the library's numbers bit by
bit and the same on every device; the library dequantises 4-bit blocks, in one pass of its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _library() -> str | None:
    """Import it; None, or why that cannot be."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "not installed, so PyTorch dequantises; pip install 'shardwise[qlora]'"
    # It looks for kernels to download, which nobody asked for, and warns that there are none.
    log = logging.getLogger("bitsandbytes")
    before, log.level = log.level, logging.ERROR
    try:
        library = importlib.import_module("bitsandbytes")
        native = importlib.import_module("bitsandbytes.cextension").lib
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"cannot be imported ({error}); pip install 'shardwise[qlora]'"
    finally:
        log.setLevel(before)
    if type(native).__name__ == "ErrorHandlerMockBNBNativeLibrary":
        return f"version {library.__version__} has no compiled part for this machine"
    return None


def unusable(device: torch.device) -> str | None:
    """None when the library will dequantise 4-bit weights there, else the reason."""
    if device.type not in ("cpu", "cuda"):
        return f"bitsandbytes runs on CPU and CUDA here, not on {device.type}"
    return _library()


def dequantise_nf4(codes_NC: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 64): blocks of NF4 codes, two a byte, times their fp32 scales.

    Rows of one block each, whatever the matrix: version 0.50.2 takes other blocks' scales on CPUs
    with AVX-512 where rows are not whole blocks.
    """
    shape = (len(codes_NC), 2 * codes_NC.shape[1])
    wide = dtype if dtype in DTYPES else torch.float32
    found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes_NC.reshape(-1, 1), scale_N, shape[1], "nf4", shape, wide
    )
    return found.to(dtype)
