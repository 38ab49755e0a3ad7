"""Engines by kind: their config classes now, what builds them when it is wanted.

Nothing here imports torch, so that reading a recipe does not. Another package adds its own by the
entry-point group ``shardwise.engines``, whose target is imported and calls `register_engine`; it
keeps commands without tensors fast by naming what builds as ``"module:name"``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from shardwise.config.registry import register_engine_config
from shardwise.config.schema import EngineConfig, NativeConfig
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.engines.plain_config import PlainConfig
from shardwise.errors import ConfigError

if TYPE_CHECKING:
    from shardwise.engines.base import Build, Engine, Setup
    from shardwise.parallel.layout import Layout

_BUILDERS: dict[str, Build | str] = {}


def register_engine(kind: str, config: type[EngineConfig], build: Build | str) -> None:
    """Make ``engine.kind: <kind>`` known: its config class, and what builds it.

    ``build(setup)`` is called by every rank of the world, and gives None on those that the setup
    leaves out.
    """
    register_engine_config(kind, config)
    _BUILDERS[kind] = build


def build_engine(setup: Setup) -> Engine:
    """A model in an engine of the kind that ``setup.config`` names; a collective call."""
    check_layout(setup.config, setup.layout)
    target = _BUILDERS[setup.config.kind]
    if isinstance(target, str):
        module, _, name = target.partition(":")
        target = getattr(importlib.import_module(module), name)
    build: Callable[[Setup], Engine | None] = target
    inner = build(setup)
    if setup.ranks is None:
        assert inner is not None
        return inner
    from shardwise.engines.placed import PlacedEngine

    adapter = setup.trained.adapter
    return PlacedEngine(inner, setup.ranks, setup.layout.dp, setup.device, adapter)


def check_layout(config: EngineConfig, layout: Layout) -> None:
    """Raise ConfigError for a layout that this kind of engine cannot have."""
    most = config.max_ranks
    if most is not None and layout.world > most:
        raise ConfigError(
            f"engine.kind: {config.kind} computes on {most} rank{'s' if most > 1 else ''}, and "
            f"engine.layout {layout} has {layout.world}; start fewer, or write kind: native"
        )


_HERE = "shardwise.engines"
register_engine("native", NativeConfig, f"{_HERE}.native:build")
register_engine("megatron", MegatronConfig, f"{_HERE}.megatron:build")
register_engine("plain", PlainConfig, f"{_HERE}.plain:build")
