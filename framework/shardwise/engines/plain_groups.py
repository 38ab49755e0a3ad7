"""The optimizers of the plain engine: groups of one tensor, `torch.optim` where it has the rule."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shardwise.config.optimizers import (
    AdafactorConfig,
    AdamWConfig,
    OptimizerConfig,
    SgdConfig,
)
from shardwise.engines import plain_optimizers as references

REFERENCES: dict[str, Any] = {
    "lion": references.Lion,
    "muon": references.Muon,
    "adamw8bit": references.AdamW8bit,
    "lomo": references.Lomo,
    "adalomo": references.AdaLomo,
    "schedule_free": references.ScheduleFree,
}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The configured optimizer of `torch.optim`; its states are there, as zeros, from the start.

    Parameters whose name matches a pattern of ``no_decay`` get no weight decay; those of a group
    its rate, as a share of the common one, and its decay.
    """
    groups: list[dict[str, Any]] = []
    for name, parameter in parameters.items():
        scale, decay = 1.0, config.weight_decay
        for group in config.groups[::-1]:  # so that the first that matches has the last word
            if fnmatch.fnmatchcase(name, group.match):
                scale = 1.0 if group.lr_scale is None else group.lr_scale
                scale = scale if group.lr is None else group.lr / config.lr
                decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.no_decay):
            decay = 0.0
        groups.append(
            {"params": [parameter], "weight_decay": decay, "lr_scale": scale, "name": name}
        )
    if config.kind in REFERENCES:
        found: torch.optim.Optimizer = REFERENCES[config.kind](groups, config)
        return found
    return _of_torch(groups, config)


def _of_torch(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    parameters = [group["params"][0] for group in groups]
    optimizer: torch.optim.Optimizer
    if isinstance(config, AdafactorConfig):
        eps = (config.eps1, config.eps2)
        optimizer = torch.optim.Adafactor(
            groups, config.lr, -config.decay_power, eps, config.clip_threshold, foreach=False
        )
        for p in parameters:
            shapes = {"variance": p.shape}
            if p.dim() == 2:
                shapes = {"row_var": (p.shape[0], 1), "col_var": (1, p.shape[1])}
            zeros = {kind: p.data.new_zeros(shape) for kind, shape in shapes.items()}
            optimizer.state[p] = {"step": torch.zeros(()), **zeros}
        return optimizer
    if isinstance(config, SgdConfig):
        momentum, nesterov = config.momentum, config.nesterov
        optimizer = torch.optim.SGD(
            groups, config.lr, momentum, nesterov=nesterov, foreach=False, fused=False
        )
        kinds = ["momentum_buffer"] if momentum else []
    else:
        assert isinstance(config, AdamWConfig)  # or Adam's
        adam = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
        betas = (config.beta1, config.beta2)
        optimizer = adam(groups, config.lr, betas, config.eps, foreach=False, fused=False)
        kinds = ["exp_avg", "exp_avg_sq"]
    for parameter in parameters:
        state = optimizer.state[parameter]
        state |= {kind: torch.zeros_like(parameter.data) for kind in kinds}
        if config.kind != "sgd":
            state["step"] = torch.zeros(())
    return optimizer
