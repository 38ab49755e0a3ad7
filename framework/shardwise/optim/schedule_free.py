"""Schedule-free AdamW: Defazio et al. 2024, "The Road Less Scheduled", algorithm 1.

Three sequences: gradients are taken at y, the base optimizer moves z, and x, the average, is what
training comes to. Between updates parameters hold x, so whatever evaluates, saves or exports them
has it; z is a state, and `begin` makes them y for the passes of an update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from shardwise.config.optimizers import ScheduleFreeConfig
from shardwise.optim import parts
from shardwise.optim.rule import RuleOptimizer, bias_correction, counter


class ScheduleFree(RuleOptimizer):
    """Two states, and of the average the sum of its weights."""

    config: ScheduleFreeConfig
    _at_y = False

    def start(self, name: str, param: Parameter) -> dict[str, Tensor]:
        """See `RuleOptimizer`; z starts as the weights are when the first update begins."""
        return {
            "step": counter(),
            "weight_sum": torch.zeros((), dtype=torch.float64),
            "lr_max": torch.zeros((), dtype=torch.float64),
            "z": parts.zeros(param),
            "exp_avg_sq": parts.zeros(param),
        }

    @torch.no_grad()
    def begin(self) -> None:
        """Parameters become y, where gradients are to be taken."""
        assert not self._at_y
        self.announce()
        self._at_y = True
        for param, state in self.state.items():
            weight, z = (parts.local_tensor(t.detach()) for t in (param, state["z"]))
            if state["step"].item() == 0:
                z.copy_(weight)
            weight.lerp_(z, 1 - self.config.beta1)

    @torch.no_grad()
    def end(self) -> None:
        """Parameters become x again, if `step` did not make them so."""
        if not self._at_y:
            return
        self._at_y = False
        for param, state in self.state.items():
            weight, z = (parts.local_tensor(t.detach()) for t in (param, state["z"]))
            weight.copy_(self._average(weight, z))

    def _average(self, y: Tensor, z: Tensor) -> Tensor:
        return y.lerp(z, 1 - 1 / self.config.beta1)

    def update(
        self, param: Parameter, weight: Tensor, grad: Tensor, state: dict[str, Any], group: Any
    ) -> None:
        """See `RuleOptimizer`."""
        lr, config = group["lr"], self.config
        z, v = (parts.local_tensor(state[key]) for key in ("z", "exp_avg_sq"))
        v.mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
        root = (v / bias_correction(config.beta2, state)).sqrt_().add_(config.eps)
        x = self._average(weight, z)
        z.add_(grad.div(root).add_(weight, alpha=group["weight_decay"]), alpha=-lr)
        state["lr_max"].clamp_(min=lr)
        share = state["lr_max"].item() ** 2
        state["weight_sum"] += share
        weight.copy_(x.lerp_(z, share / state["weight_sum"].item() if share else 0.0))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """See `RuleOptimizer`."""
        super().step(closure)
        for param, state in self.state.items():  # without a gradient
            if param.grad is None:
                weight, z = (parts.local_tensor(t.detach()) for t in (param, state["z"]))
                weight.copy_(self._average(weight, z))
        self._at_y = False
