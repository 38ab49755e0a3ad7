"""The one place that imports NVIDIA's apex, and says why when it cannot be used.

It is built from github.com/NVIDIA/apex; PyPI's package of that name is a web toolkit. Not yet run
on a GPU: ``tests/contracts`` holds the calls to the signatures of its releases.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
from typing import Any

import torch

WRONG = (
    "the installed apex is not NVIDIA's but PyPI's web toolkit; uninstall it (NVIDIA's is "
    "built from github.com/NVIDIA/apex)"
)


def is_nvidias() -> bool | None:
    """Whether the installed package is NVIDIA's; None: there is none. Runs nothing of it."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = spec.submodule_search_locations or []
    return any(_has_module(folder, name) for folder in folders for name in ("optimizers", "amp"))


def _has_module(folder: str, name: str) -> bool:
    finder = importlib.machinery.PathFinder()
    return finder.find_spec(name, [folder]) is not None


@functools.cache
def _library() -> tuple[Any, str]:
    """Its optimizers, or None and why not."""
    if not torch.cuda.is_available():
        return None, "apex is installed, but there is no CUDA device"
    try:
        importlib.import_module("amp_C")  # its kernels, which a build without CUDA lacks
        return importlib.import_module("apex.optimizers"), ""
    except ImportError as error:
        return None, f"apex cannot be imported ({error}); build it with its CUDA extensions"


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when apex can update such parameters, else the reason."""
    if device.type != "cuda":
        return f"apex runs on CUDA only, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"apex updates fp32, bf16 and fp16 parameters only, not {dtype}"
    found = is_nvidias()
    if found is None:
        return "not installed; NVIDIA's apex is built from github.com/NVIDIA/apex"
    if not found:
        return WRONG
    library, reason = _library()
    return None if library is not None else reason


def fused_adam(groups: list[dict[str, Any]], **settings: Any) -> Any:
    """Its ``FusedAdam`` over groups of plain tensors."""
    library, reason = _library()
    assert library is not None, reason
    return library.FusedAdam(groups, **settings)
