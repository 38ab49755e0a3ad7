"""A stand-in for NVIDIA's apex: a release's signatures, its FusedAdam computed by plain PyTorch.

What the library does its own way is done alike: one count of updates a group, which it raises
itself; parameters without a gradient are passed over; states are looked up by parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from shardwise.ops import apex
from tests.contracts.signatures import checked


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float, bias_correction: bool, betas: Any, eps: float,
                 adam_w_mode: bool, weight_decay: float, **rest: Any) -> None:  # fmt: skip
        assert not rest["amsgrad"] and not rest.get("capturable")
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        self.decoupled = adam_w_mode

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), t = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                assert type(p.data) is torch.Tensor and p.grad.dtype == p.dtype
                g = p.grad if self.decoupled else p.grad + group["weight_decay"] * p.data
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                m.mul_(beta1).add_(g, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
                if self.decoupled:
                    update = update + group["weight_decay"] * p.data
                p.data.sub_(group["lr"] * update)


@contextlib.contextmanager
def installed(version: str) -> Iterator[None]:
    """That release, on the CPU."""
    make = checked("apex", "apex.optimizers.FusedAdam", version, FusedAdam)
    library = SimpleNamespace(FusedAdam=make)
    with (
        mock.patch.object(apex, "_library", lambda: (library, "")),
        mock.patch.object(apex, "unusable", lambda device, dtype: None),
    ):
        yield
