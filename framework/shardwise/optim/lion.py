"""Lion: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Parameter

from shardwise.config.optimizers import LionConfig
from shardwise.optim import parts
from shardwise.optim.rule import RuleOptimizer


class Lion(RuleOptimizer):
    """The sign of a mixture of gradient and momentum; one state."""

    config: LionConfig

    def start(self, name: str, param: Parameter) -> dict[str, Tensor]:
        """See `RuleOptimizer`."""
        return {"exp_avg": parts.zeros(param)}

    def update(
        self, param: Parameter, weight: Tensor, grad: Tensor, state: dict[str, Any], group: Any
    ) -> None:
        """See `RuleOptimizer`."""
        m = parts.local_tensor(state["exp_avg"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(m.lerp(grad, 1 - self.config.beta1).sign_(), alpha=-group["lr"])
        m.lerp_(grad, 1 - self.config.beta2)
