"""Optimizers over named parameters, and their state under checkpoint names.

The state is materialised as zeros when the optimizer is built, not at the first update: its
memory is then visible before training, a checkpoint can be loaded into it in place, and a resumed
run takes exactly the path of an unbroken one (torch starts an SGD momentum buffer as a copy of the
first gradient, which equals one update of a zero buffer).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import Parameter

from shardwise.config.schema import OptimizerConfig
from shardwise.errors import ConfigError

logger = logging.getLogger(__name__)


def build_optimizer(
    named_params: Iterable[tuple[str, Parameter]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The configured optimizer, its state zeroed in place.

    Parameters whose name matches a pattern of ``config.no_decay`` get no weight decay. AdamW
    decouples the decay (Loshchilov & Hutter 2019, algorithm 2); Adam and SGD add it to the
    gradient (L2). Each group carries ``param_names``. Raises ConfigError if nothing is trainable.
    """
    trainable = [(n, p) for n, p in named_params if p.requires_grad]
    if not trainable:
        raise ConfigError("optimizer: no parameter requires a gradient; nothing would be trained")
    if config.nesterov and config.momentum == 0.0:
        raise ConfigError("optimizer.nesterov needs optimizer.momentum > 0")
    make = _constructor(config)
    implementation = choose_implementation(make, [p for _, p in trainable])
    optimizer = make(decay_groups(trainable, config), **{implementation: True})
    ensure_state(optimizer)
    return optimizer


def decay_groups(
    named_params: Iterable[tuple[str, Parameter]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Parameter groups in torch's named form: with decay first, then without; empty ones left out.

    Parameters on different device meshes never share a group: torch's multi-tensor kernels
    refuse to mix them.
    """
    groups: dict[tuple[bool, Any], list[tuple[str, Parameter]]] = {}
    for name, param in named_params:
        free = any(fnmatchcase(name, pattern) for pattern in config.no_decay)
        mesh = param.device_mesh if isinstance(param, DTensor) else None
        groups.setdefault((free, mesh), []).append((name, param))
    return [
        {"params": params, "weight_decay": 0.0 if free else config.weight_decay}
        for (free, _), params in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr`` in every group from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def ensure_state(optimizer: torch.optim.Optimizer) -> None:
    """Create, as zeros, all state that the first update would create. State present is kept."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            if state:
                continue
            zeros = functools.partial(torch.zeros_like, param.detach())
            if isinstance(optimizer, torch.optim.SGD):
                if group["momentum"]:
                    state["momentum_buffer"] = zeros()
                continue
            # torch keeps the counter on the parameter's device for its fused kernel only.
            device = param.device if group["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = zeros()
            state["exp_avg_sq"] = zeros()


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_params: Iterable[tuple[str, Parameter]]
) -> dict[str, Tensor]:
    """The live state tensors as ``optim.<param>.<exp_avg|exp_avg_sq|momentum_buffer|step>``.

    Writing into them in place is how a checkpoint is restored. Moments have the shape, dtype and
    placement of their parameter; ``step`` is an fp32 scalar, equal on every rank.
    """
    ensure_state(optimizer)
    return {
        f"optim.{name}.{key}": value
        for name, param in named_params
        if param in optimizer.state
        for key, value in sorted(optimizer.state[param].items())
        if isinstance(value, Tensor)
    }


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


def _constructor(config: OptimizerConfig) -> Callable[..., torch.optim.Optimizer]:
    if config.kind == "sgd":
        return functools.partial(
            torch.optim.SGD,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    adam = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    return functools.partial(
        adam,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
