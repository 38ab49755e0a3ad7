"""Adafactor: second moments by rows and columns (Shazeer and Stern 2018, algorithms 4 and 5).

As `torch.optim.Adafactor` has it, which fails under FSDP2: means are those of the whole tensor, so
ranks that hold parts of it sum them up.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from shardwise.config.optimizers import FactoredConfig
from shardwise.optim import parts
from shardwise.optim.rule import RuleOptimizer, counter


class Factored(RuleOptimizer):
    """For a matrix a number a row and one a column, else one an element."""

    config: FactoredConfig

    def start(self, name: str, param: Parameter) -> dict[str, Tensor]:
        """See `RuleOptimizer`."""
        if param.dim() != 2:
            return {"step": counter(), "variance": parts.zeros(param)}
        return {
            "step": counter(),
            "row_var": parts.zeros(param, reduced=(1,)),
            "col_var": parts.zeros(param, reduced=(0,)),
        }

    def rate(self, lr: float, step: float) -> float:
        """Relative to the weights' size: at most ``lr``, and 1 / sqrt(step)."""
        return min(lr, 1.0 / math.sqrt(step))

    def update(
        self, param: Parameter, weight: Tensor, grad: Tensor, state: dict[str, Any], group: Any
    ) -> None:
        """See `RuleOptimizer`."""
        config, step = self.config, state["step"].item()
        size = max(config.eps2, _root_mean_square(weight, param))
        fresh = step**-config.decay_power
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        if param.dim() == 2:
            row, column = (parts.local_tensor(state[key]) for key in ("row_var", "col_var"))
            square = grad.square()
            rows, columns = param.shape
            row.lerp_(parts.total(square.sum(1, keepdim=True), param, 1).div_(columns), fresh)
            column.lerp_(parts.total(square.sum(0, keepdim=True), param, 0).div_(rows), fresh)
            mean = parts.total(row.sum(), param, 0) / rows
            variance = (row @ column).div_(mean.clamp(min=config.eps1))
        else:
            variance = parts.local_tensor(state["variance"])
            variance = variance.lerp_(grad.square(), fresh).clone()
        moved = variance.clamp_(min=config.eps1**2).rsqrt_().mul_(grad)
        too_far = max(1.0, _root_mean_square(moved, param) / config.clip_threshold)
        weight.add_(moved, alpha=-size * self.rate(group["lr"], step) / too_far)


def _root_mean_square(own: Tensor, param: Parameter) -> float:
    """Of the whole tensor, of which this rank holds ``own``."""
    return math.sqrt(parts.total(own.square().sum(), param).item() / param.numel())
