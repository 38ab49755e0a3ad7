"""Which dtype holds what. Masters, reductions and optimizer states are fp32 (fp64 in fp64 runs)."""

from __future__ import annotations

import dataclasses

import torch


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
