"""Which dtype holds what. Masters, reductions and optimizer states are fp32 (fp64 in fp64 runs)."""

from __future__ import annotations

import dataclasses

import torch

from shardwise.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Precision:
    """``compute``: gathered weights and activations; ``master``: shards, gradients, optimizer."""

    compute: torch.dtype
    master: torch.dtype
    loss_scaling: bool = False


PRECISIONS = {
    "fp64": Precision(torch.float64, torch.float64),
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.float32),
    "fp16": Precision(torch.float16, torch.float32, loss_scaling=True),
}


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 products; without them they are far slower than fp32's.

    An x86 processor needs AVX512-BF16 or AMX (measured on one with AVX2 alone: fp32 products 40
    times as fast as bf16 ones). Others are taken at PyTorch's word for fp32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def resolve(name: str, device: torch.device) -> str:
    """``auto`` is bf16 where the hardware multiplies it, else fp32; other names stay."""
    if name == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    return name


def precision_of(name: str, device: torch.device) -> Precision:
    """The row of a name; raises ConfigError for an unknown one."""
    row = PRECISIONS.get(resolve(name, device))
    if row is None:
        known = ", ".join(["auto", *PRECISIONS])
        raise ConfigError(f"engine.precision: unknown {name!r}; known: {known}")
    return row
