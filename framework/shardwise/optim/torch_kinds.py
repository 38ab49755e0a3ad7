"""Optimizers of `torch.optim`: AdamW, Adam and SGD, fused where that works.

AdamW decouples the decay (Loshchilov and Hutter 2019, algorithm 2); Adam and SGD add it to the
gradient (L2). Torch starts an SGD momentum buffer as a copy of the first gradient, which equals one
update of a zero buffer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import Parameter

from shardwise.config.optimizers import AdamConfig, AdamWConfig, SgdConfig
from shardwise.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def build(
    groups: list[dict[str, Any]], config: AdamWConfig | AdamConfig | SgdConfig, mesh: Mesh | None
) -> torch.optim.Optimizer:
    """See `optim.registry.register_optimizer`."""
    optimizer = without_state(groups, config)
    ensure_state(optimizer)
    return optimizer


def without_state(
    groups: list[dict[str, Any]], config: AdamWConfig | AdamConfig | SgdConfig
) -> torch.optim.Optimizer:
    """The same before it has any: for a library that puts other tensors in parameters' place."""
    make = _constructor(config)
    implementation = choose_implementation(make, [p for g in groups for _, p in g["params"]])
    return make(groups, **{implementation: True})


def ensure_state(optimizer: torch.optim.Optimizer) -> None:
    """Create, as zeros, all state that the first update would create. State present is kept."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                start_state(optimizer, group, param)


def start_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], param: Tensor) -> None:
    """The state of one parameter of ``group`` before its first update."""
    state = optimizer.state[param]
    zeros = functools.partial(torch.zeros_like, param.detach())
    if isinstance(optimizer, torch.optim.SGD):
        if group["momentum"]:
            state["momentum_buffer"] = zeros()
        return
    # torch keeps the counter on the parameter's device for its fused kernel only.
    device = param.device if group["fused"] else torch.device("cpu")
    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    state["exp_avg"] = zeros()
    state["exp_avg_sq"] = zeros()


def choose_implementation(make: Callable[..., Any], params: list[Parameter]) -> str:
    """``fused`` if torch's fused kernel really updates such parameters here, else ``foreach``."""
    kinds = {(p.device.type, p.dtype, isinstance(p, DTensor)): p for p in params}
    for (device, dtype, _), param in kinds.items():
        reason = _fused_fails(make, param)
        if reason is not None:
            logger.info("optimizer: foreach, as fused fails on %s %s: %s", device, dtype, reason)
            return "foreach"
    return "fused"


def _fused_fails(make: Callable[..., Any], like: Parameter) -> str | None:
    """Why one fused update of a one-element parameter of ``like``'s kind fails; None if it works.

    The probe is as local as the update itself: it communicates nothing.
    """
    local = torch.zeros(1, dtype=like.dtype, device=like.device)
    tensor: Tensor = local
    if isinstance(like, DTensor):
        mesh = like.device_mesh
        tensor = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    probe = Parameter(tensor)
    probe.grad = torch.ones_like(tensor)
    try:
        make([probe], fused=True, lr=1.0).step()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return str(error).splitlines()[0]
    return None if bool(local.ne(0).all()) else "the update changed nothing"


def _constructor(
    config: AdamWConfig | AdamConfig | SgdConfig,
) -> Callable[..., torch.optim.Optimizer]:
    if isinstance(config, SgdConfig):
        momentum, nesterov = config.momentum, config.nesterov
        return functools.partial(torch.optim.SGD, momentum=momentum, nesterov=nesterov)
    adam = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    betas = (config.beta1, config.beta2)
    return functools.partial(adam, betas=betas, eps=config.eps)
