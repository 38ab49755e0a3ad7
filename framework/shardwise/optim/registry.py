"""Optimizers by kind: their config classes now, what builds them when it is wanted.

Nothing here imports torch, so that reading a recipe does not. Another package adds its own by the
entry-point group ``shardwise.optimizers``, whose target is imported and calls `register_optimizer`;
it keeps commands without tensors fast by naming what builds as ``"module:name"``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shardwise.config import optimizers as configs
from shardwise.config.registry import register_optimizer_config

if TYPE_CHECKING:
    import torch

    from shardwise.parallel.mesh import Mesh

    Build = Callable[[list[dict[str, Any]], Any, Mesh | None], torch.optim.Optimizer]

_BUILDERS: dict[str, Build | str] = {}


def register_optimizer(
    kind: str, config: type[configs.OptimizerConfig], build: Build | str
) -> None:
    """Make ``optimizer.kind: <kind>`` known: its config class, and what builds it.

    ``build(groups, config, mesh)`` gets groups in torch's named form, each with its
    ``weight_decay``, and gives an optimizer whose state is there, as zeros, before the first
    update. ``mesh``: of the ranks that hold the parts of parameters that are DTensors.
    """
    register_optimizer_config(kind, config)
    _BUILDERS[kind] = build


def builder_of(kind: str) -> Build:
    """What builds a kind."""
    target = _BUILDERS[kind]
    if isinstance(target, str):
        module, _, name = target.partition(":")
        target = getattr(importlib.import_module(module), name)
    build: Build = target  # type: ignore[assignment]
    return build


_HERE = "shardwise.optim"
register_optimizer("adamw", configs.AdamWConfig, f"{_HERE}.adam:build")
register_optimizer("adam", configs.AdamConfig, f"{_HERE}.adam:build")
register_optimizer("sgd", configs.SgdConfig, f"{_HERE}.torch_kinds:build")
register_optimizer("lion", configs.LionConfig, f"{_HERE}.lion:Lion")
register_optimizer("muon", configs.MuonConfig, f"{_HERE}.muon:Muon")
register_optimizer("adafactor", configs.AdafactorConfig, f"{_HERE}.factored:Factored")
register_optimizer("adamw8bit", configs.AdamW8bitConfig, f"{_HERE}.blockwise:AdamW8bit")
register_optimizer(
    "schedule_free", configs.ScheduleFreeConfig, f"{_HERE}.schedule_free:ScheduleFree"
)
register_optimizer("lomo", configs.LomoConfig, f"{_HERE}.fused:Lomo")
register_optimizer("adalomo", configs.AdaLomoConfig, f"{_HERE}.fused:AdaLomo")
