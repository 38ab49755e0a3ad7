"""Adapters by kind: their config classes now, what builds them when it is wanted.

Nothing here imports torch. Another package adds its own by the entry-point group
``shardwise.adapters``, whose target is imported and calls `register_adapter`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from shardwise.adapters.config import BottleneckConfig, DoraConfig, LoraConfig
from shardwise.config.adapters import AdapterConfig
from shardwise.config.registry import register_adapter_config

if TYPE_CHECKING:
    from shardwise.adapters.base import Adapter
    from shardwise.models.common.config import DecoderConfig

_BUILDERS: dict[str, str] = {}


def register_adapter(kind: str, config: type[AdapterConfig], build: str) -> None:
    """Make ``adapter.kind: <kind>`` known: its config class, and ``"module:name"`` of what builds
    it, called with a config and a model's."""
    register_adapter_config(kind, config)
    _BUILDERS[kind] = build


def build_adapter(config: AdapterConfig, model: DecoderConfig) -> Adapter:
    """The adapter that a config names. Raises ConfigError if the model cannot have it."""
    module, _, name = _BUILDERS[config.kind].partition(":")
    build: Callable[[AdapterConfig, DecoderConfig], Adapter]
    build = getattr(importlib.import_module(module), name)
    return build(config, model)


for _kind, _config in (("lora", LoraConfig), ("dora", DoraConfig)):
    register_adapter(_kind, _config, "shardwise.adapters.low_rank:LowRankAdapter")
register_adapter("bottleneck", BottleneckConfig, "shardwise.adapters.bottleneck:BottleneckAdapter")
