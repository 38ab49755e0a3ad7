"""The frame of our own optimizers: one rule, a parameter at a time, on this rank's parts."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import _global_optimizer_pre_hooks

from shardwise.config.optimizers import OptimizerConfig
from shardwise.parallel.full_tensor import local_tensor
from shardwise.parallel.mesh import Mesh


class RuleOptimizer(torch.optim.Optimizer, abc.ABC):
    """Calls `update` for each parameter with a gradient. States are there from the start."""

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, mesh: Mesh | None
    ) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.config, self.mesh = config, mesh
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                self.state[param] = self.start(name, param)

    @abc.abstractmethod
    def start(self, name: str, param: Parameter) -> dict[str, Tensor]:
        """The states of a parameter before its first update, zeros; ``step`` if it counts."""

    @abc.abstractmethod
    def update(
        self, param: Parameter, weight: Tensor, grad: Tensor, state: dict[str, Any], group: Any
    ) -> None:
        """One update in place. ``weight``, ``grad``: this rank's parts; ``group``: lr, decay."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update_one(param, param.grad, group)

    def announce(self) -> None:
        """Tell whoever hooks into optimizers' steps that weights are about to move before one."""
        for hook in _global_optimizer_pre_hooks.values():
            hook(self, (), {})

    def update_one(self, param: Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        """One parameter's update by a gradient of its own placement."""
        state = self.state[param]
        if "step" in state:
            state["step"] += 1
        self.update(param, local_tensor(param.detach()), local_tensor(grad), state, group)


def counter() -> Tensor:
    """Updates of a parameter: an fp32 scalar on the CPU, as torch's optimizers keep it."""
    return torch.zeros(())


def bias_correction(beta: float, state: dict[str, Any]) -> float:
    """1 - beta^t: Kingma and Ba 2015, section 3."""
    return float(1.0 - beta ** state["step"].item())


def adamw_direction(grad: Tensor, m: Tensor, v: Tensor, config: Any, state: Any) -> Tensor:
    """Update both moments in place; what AdamW moves against, times the rate: its algorithm 2."""
    m.lerp_(grad, 1 - config.beta1)
    v.mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
    root = (v / bias_correction(config.beta2, state)).sqrt_().add_(config.eps)
    return (m / bias_correction(config.beta1, state)).div_(root)
