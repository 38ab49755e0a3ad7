"""Which optional kernels this machine can use, and why not the others; read by `doctor`."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch

from shardwise.ops import (
    apex,
    bitsandbytes,
    compiled,
    cpu_attention,
    cpu_softmax,
    flash,
    fp8_kernels,
    transformer_engine,
)


@dataclasses.dataclass(frozen=True)
class Capability:
    """One optional library: whether it is used, and the reason or the version."""

    library: str
    purpose: str
    used: bool
    detail: str


def capabilities() -> list[Capability]:
    """The whole table, probed now. Never raises; a library that fails to import is a row."""
    rows: list[tuple[str, str, Callable[[], str | None]]] = [
        ("flash_attn", "attention", _flash_attn),
        ("transformer_engine", f"FP8 linear layers ({_scalings()})", _transformer_engine),
        ("apex", "optimizer.fused: apex", _apex),
        ("triton", "FP8 quantisers of the emulation", _triton),
        ("float8", "engine.fp8, emulated", _float8),
        ("cpu_kernels", "attention and softmax on CPU", _cpu_kernels),
        ("bitsandbytes", "adapter.quantise: nf4", _bitsandbytes),
        ("deepspeed", "engine.kind: deepspeed", functools.partial(_installed, "deepspeed")),
        ("megatron_core", "engine.kind: megatron", functools.partial(_installed, "megatron")),
    ]
    found = []
    for library, purpose, probe in rows:
        reason = probe()
        version = _PARTS.get(library) or f"version {_version(library)}"
        detail = reason if reason is not None else version
        found.append(Capability(library, purpose, reason is None, detail))
    return found


_PARTS = {"float8": "part of torch", "cpu_kernels": "built here by the C++ compiler"}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cpu_kernels() -> str | None:
    return compiled.unusable(cpu_attention.library) or compiled.unusable(cpu_softmax.library)


def _bitsandbytes() -> str | None:
    return bitsandbytes.unusable(torch.device("cpu"))


def _installed(extra: str) -> str | None:
    """Engines are imported, and judged by their release, when a recipe asks for them."""
    if importlib.util.find_spec(extra) is not None:
        return None
    return f"not installed; pip install 'shardwise[{extra}]'"


def _flash_attn() -> str | None:
    return flash.unusable(torch.device("cuda"), torch.bfloat16)


def _transformer_engine() -> str | None:
    return transformer_engine.unusable(torch.device("cuda"))


def _scalings() -> str:
    """Which of the library's recipes this machine's GPU has products for."""
    device = torch.device("cuda")
    if _transformer_engine() is not None:
        return "else emulated"
    usable = {s: transformer_engine.unusable(device, scaling=s) for s in transformer_engine.NEEDS}
    return ", ".join(f"{s}: {'yes' if why is None else why}" for s, why in usable.items())


def _apex() -> str | None:
    return apex.unusable(torch.device("cuda"), torch.float32)


def _float8() -> str | None:
    """Casts to and from the 8-bit types, on the CPU."""
    try:
        ones = torch.ones(1)
        for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
            ones.to(kind).float()
    except (AttributeError, RuntimeError) as error:
        return f"this torch cannot cast to 8-bit floats ({error}); install torch 2.11 or newer"
    return None


def _triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "not installed; it comes with CUDA builds of torch"
    if not torch.cuda.is_available():
        return "installed, but there is no CUDA device"
    return fp8_kernels.unusable(torch.device("cuda"))
