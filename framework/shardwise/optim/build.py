"""Optimizers over named parameters, and their state under checkpoint names.

State is there as zeros when an optimizer is built, not at the first update: its memory is then
visible before training, a checkpoint can be loaded into it in place, and a resumed run takes
exactly the path of an unbroken one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from shardwise.config.explain import nearest
from shardwise.config.optimizers import OptimizerConfig
from shardwise.errors import ConfigError
from shardwise.optim.registry import builder_of
from shardwise.parallel.mesh import Mesh


def build_optimizer(
    named_params: Iterable[tuple[str, Parameter]], config: OptimizerConfig, mesh: Mesh | None = None
) -> torch.optim.Optimizer:
    """The configured optimizer, its state zeroed in place.

    Each group carries ``param_names``, its ``weight_decay`` and ``lr_scale``. Raises ConfigError
    if nothing is trainable.
    """
    trainable = [(n, p) for n, p in named_params if p.requires_grad]
    if not trainable:
        raise ConfigError("optimizer: no parameter requires a gradient; nothing would be trained")
    optimizer = builder_of(config.kind)(parameter_groups(trainable, config), config, mesh)
    set_lr(optimizer, config.lr)
    return optimizer


def parameter_groups(
    named_params: Iterable[tuple[str, Parameter]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Parameter groups in torch's named form; empty ones left out.

    Parameters on different device meshes never share a group: torch's multi-tensor kernels
    refuse to mix them.
    """
    groups: dict[tuple[float, float, Any], list[tuple[str, Parameter]]] = {}
    for name, param in named_params:
        mesh = param.device_mesh if isinstance(param, DTensor) else None
        key = (config.lr_scale_of(name), config.decay_of(name), mesh)
        groups.setdefault(key, []).append((name, param))
    return [
        {"params": params, "lr_scale": lr_scale, "weight_decay": decay}
        for (lr_scale, decay, _), params in groups.items()
    ]


def check_groups(config: OptimizerConfig, names: Iterable[str], key: str) -> None:
    """Raise ConfigError for a group of ``optimizer.groups`` that no trainable parameter joins.

    ``key``: of the optimizer in the recipe, with its source if there is one.
    """
    names = list(names)
    for pattern in config.unmatched(names):
        like = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
        raise ConfigError(
            f"{key}: group {pattern!r} matches no trainable parameter that an earlier group leaves"
            f"{nearest(pattern, like) or '; name patterns such as ' + ', '.join(list(like)[:3])}"
        )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr``, times its scale, in every group from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_params: Iterable[tuple[str, Parameter]]
) -> dict[str, Tensor]:
    """The live state tensors as ``optim.<param>.<kind>``, such as ``exp_avg``, and ``.step``.

    Writing into them in place is how a checkpoint is restored. A state is a DTensor where its
    parameter is one, cut as that is as far as its own shape goes; ``step`` is an fp32 scalar,
    equal on every rank.
    """
    return {
        f"optim.{name}.{key}": value
        for name, param in named_params
        if param in optimizer.state
        for key, value in sorted(optimizer.state[param].items())
        if isinstance(value, Tensor)
    }
