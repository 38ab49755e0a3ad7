"""LOMO and AdaLomo: each weight moves in the backward pass, as soon as its gradient is there.

Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources": no
buffer of gradients, and for plain LOMO no state. Lv et al. 2024, "AdaLomo", algorithm 1: the second
moments, grouped normalisation and relative rates of Adafactor, in the same way.

So the rate must be known before the pass, a weight has one gradient (one micro-batch, no pipeline),
and nothing asks all gradients first (no clipping, no update left out): `parallel.feasible` refuses
the rest. A gradient that is a sum over tensor-parallel ranks behind the pass waits for `step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from shardwise.config.optimizers import FactoredConfig, LomoConfig
from shardwise.optim.factored import Factored
from shardwise.optim.rule import RuleOptimizer
from shardwise.parallel.full_tensor import local_tensor


class InBackward(RuleOptimizer):
    """Parameters update themselves in hooks, between `arm` and `step`, which updates the rest."""

    fused = True
    _armed = False

    def attach(self, waits: Callable[[Parameter], bool]) -> None:
        """Register the hooks. ``waits``: whose gradient is not whole when the hook runs."""
        self.squares: dict[Parameter, Tensor] = {}  # of gradients that are gone
        for group in self.param_groups:
            for param in group["params"]:
                if not waits(param):
                    param.register_post_accumulate_grad_hook(self._hook(group))

    def arm(self) -> None:
        """An update begins; groups have its rate."""
        self.announce()
        self._armed = True
        self.squares.clear()

    def _hook(self, group: dict[str, Any]) -> Callable[[Parameter], None]:
        @torch.no_grad()
        def move(param: Parameter) -> None:
            if param.grad is None:  # its product was left for later
                return
            assert self._armed and param not in self.squares
            self.squares[param] = local_tensor(param.grad).double().square().sum()
            self.update_one(param, param.grad, group)
            param.grad = None

        return move

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what waited."""
        assert self._armed
        super().step(closure)
        self._armed = False


class Lomo(InBackward):
    """SGD without a state."""

    config: LomoConfig

    def start(self, name: str, param: Parameter) -> dict[str, Tensor]:
        """See `RuleOptimizer`."""
        return {}

    def update(
        self, param: Parameter, weight: Tensor, grad: Tensor, state: dict[str, Any], group: Any
    ) -> None:
        """See `RuleOptimizer`."""
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(grad, alpha=-group["lr"])


class AdaLomo(InBackward, Factored):
    """Adafactor whose rate is not bound by the step."""

    config: FactoredConfig

    def rate(self, lr: float, step: float) -> float:
        """Relative to the weights' size."""
        return lr
