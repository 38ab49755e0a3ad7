"""Adam and AdamW: torch's, or NVIDIA's apex where a recipe wants it and it can be used.

That library keeps one count of updates a group and knows no DTensors: it is given the parts that
are here, and the count before each update. States have the names and places of torch's own, so a
run may go on without the library, and one begun without it with it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn import Parameter

from shardwise.config.optimizers import AdamWConfig
from shardwise.ops import apex
from shardwise.optim import torch_kinds
from shardwise.parallel.full_tensor import local_tensor
from shardwise.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def build(
    groups: list[dict[str, Any]], config: AdamWConfig, mesh: Mesh | None
) -> torch.optim.Optimizer:
    """See `optim.registry.register_optimizer`."""
    if config.fused == "apex":
        parameters = [p for g in groups for _, p in g["params"]]
        reasons = (apex.unusable(p.device, p.dtype) for p in parameters)
        if (why := next(filter(None, reasons), None)) is None:
            return ApexAdam(groups, config)
        logger.warning("optimizer.fused: apex: %s; torch's update runs", why)
    return torch_kinds.build(groups, config, mesh)


class ApexAdam(torch.optim.Optimizer):
    """``optimizer.fused: apex``; the update is the library's."""

    def __init__(self, groups: list[dict[str, Any]], config: AdamWConfig) -> None:
        super().__init__(groups, {"lr": config.lr, "fused": False})
        torch_kinds.ensure_state(self)
        self.parts = {
            param: Parameter(local_tensor(param.detach()), requires_grad=False)
            for group in self.param_groups
            for param in group["params"]
        }
        self.library = apex.fused_adam(
            [{"params": [self.parts[p] for p in g["params"]]} for g in self.param_groups],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            adam_w_mode=config.kind == "adamw",
        )
        for param, part in self.parts.items():
            state = self.state[param]
            kinds = ("exp_avg", "exp_avg_sq")
            self.library.state[part] = {kind: local_tensor(state[kind]) for kind in kinds}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group, own in zip(self.param_groups, self.library.param_groups, strict=True):
            counts = {int(self.state[p]["step"]) for p in group["params"] if p.grad is not None}
            # One count a group: a parameter that had no gradient now and then would be corrected
            # for updates that it never had.
            if len(counts) > 1:
                raise RuntimeError(
                    "optimizer.fused: apex counts updates by group, and some parameters of this "
                    "one were left out of earlier ones; write fused: auto"
                )
            own |= {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            if counts:
                own["step"] = counts.pop()
            for param in group["params"]:
                part, grad = self.parts[param], param.grad
                part.grad = None if grad is None else local_tensor(grad)
                if grad is not None:
                    self.state[param]["step"] += 1
        self.library.step()
        for part in self.parts.values():
            part.grad = None
