"""Engines by kind: their config classes now, what builds them when it is wanted.

Nothing here imports torch, so that reading a recipe does not. Another package adds its own by the
entry-point group ``shardwise.engines``, whose target is imported and calls `register_engine`; it
keeps commands without tensors fast by naming what builds as ``"module:name"``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shardwise.config.registry import ENGINE_CONFIGS, register_engine_config
from shardwise.config.schema import EngineConfig, NativeConfig, StageConfig
from shardwise.engines.deepspeed.config import DeepSpeedConfig
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


def check_layout(config: EngineConfig, layout: Layout, stage: StageConfig | None = None) -> None:
    """Raise ConfigError for a layout, or a stage on it, that this kind of engine cannot have."""
    if why := config.refusal(layout, stage):
        raise ConfigError(why)


def as_kind(config: EngineConfig, kind: str, **own: Any) -> EngineConfig:
    """An engine section of another kind: the keys that all kinds have, and ``own``.

    Raises ConfigError for an unknown kind.
    """
    if kind not in ENGINE_CONFIGS:
        raise ConfigError(f"unknown engine {kind}; known: {', '.join(sorted(ENGINE_CONFIGS))}")
    if config.kind == kind:
        return config.model_copy(update=own)
    shared = {key: getattr(config, key) for key in EngineConfig.model_fields if key != "kind"}
    found: EngineConfig = ENGINE_CONFIGS[kind](kind=kind, **shared, **own)
    return found


_HERE = "shardwise.engines"
register_engine("native", NativeConfig, f"{_HERE}.native:build")
register_engine("megatron", MegatronConfig, f"{_HERE}.megatron:build")
register_engine("plain", PlainConfig, f"{_HERE}.plain:build")
register_engine("deepspeed", DeepSpeedConfig, f"{_HERE}.deepspeed.engine:build")
