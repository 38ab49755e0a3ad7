"""Where rooms above announce their config classes, so that the loader can validate them.

The config room is the lowest, so it cannot import models, engines or stages. They register here
instead: a model family by its ``family`` name, an engine, an optimizer, an adapter, a stage or an
evaluation by its ``kind``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

Table = dict[str, type[Any]]  # name to config class: sections import this module
MODEL_CONFIGS: Table = {}
ENGINE_CONFIGS: Table = {}
OPTIMIZER_CONFIGS: Table = {}
ADAPTER_CONFIGS: Table = {}
STAGE_CONFIGS: Table = {}  # those of jobs that train nothing, too
EVALUATION_CONFIGS: Table = {}
CALLBACK_CONFIGS: Table = {}

# Who registers, by name: this room imports none of them. They import no torch.
PROVIDERS = (
    "shardwise.models.configs",
    "shardwise.optim.registry",
    "shardwise.adapters.registry",
    "shardwise.checkpoint.start",
    "shardwise.engines.registry",
    "shardwise.stages.registry",
)
ENTRY_POINTS = (
    "shardwise.adapters",
    "shardwise.callbacks",
    "shardwise.engines",
    "shardwise.optimizers",
    "shardwise.stages",
)
DEFAULT_ENGINE = "native"  # the kind of an engine section that names none
DEFAULT_OPTIMIZER = "adamw"  # the same of an optimizer section


def register_model_config(family: str, cls: type[BaseModel]) -> None:
    """Make ``model.family: <family>`` validate against ``cls``."""
    MODEL_CONFIGS[family] = cls


def register_engine_config(kind: str, cls: type[BaseModel]) -> None:
    """Make ``engine.kind: <kind>`` validate against ``cls``."""
    ENGINE_CONFIGS[kind] = cls


def register_optimizer_config(kind: str, cls: type[BaseModel]) -> None:
    """Make ``optimizer.kind: <kind>`` validate against ``cls``."""
    OPTIMIZER_CONFIGS[kind] = cls


def register_adapter_config(kind: str, cls: type[BaseModel]) -> None:
    """Make ``adapter.kind: <kind>`` validate against ``cls``."""
    ADAPTER_CONFIGS[kind] = cls


def register_stage_config(kind: str, cls: type[BaseModel]) -> None:
    """Make ``stages[i].kind: <kind>`` validate against ``cls``."""
    STAGE_CONFIGS[kind] = cls


def register_evaluation_config(kind: str, cls: type[BaseModel]) -> None:
    """Make ``evaluations[i].kind: <kind>`` validate against ``cls``."""
    EVALUATION_CONFIGS[kind] = cls


def register_callback_config(kind: str, cls: type[BaseModel]) -> None:
    """Make ``callbacks[i].kind: <kind>`` validate against ``cls``."""
    CALLBACK_CONFIGS[kind] = cls


@functools.cache
def discover() -> None:
    """Let the rooms above, and other packages by entry point, register what they have."""
    for module in PROVIDERS:
        importlib.import_module(module)
    for group in ENTRY_POINTS:
        for entry in importlib.metadata.entry_points(group=group):
            entry.load()


def validate(
    data: Any,
    info: ValidationInfo,
    key: str,
    table: Mapping[str, Any],
    base: type[BaseModel],
    default: str | None = None,
) -> Any:
    """Validate a mapping against the class registered under ``data[key]``, or else ``default``.

    Its errors keep their own locations: pydantic unfolds a ValidationError that a validator raises.
    """
    if isinstance(data, base):
        return data
    if not isinstance(data, dict):
        raise ValueError(f"expected a mapping with the key {key!r}")
    name = data.get(key, default)
    if not isinstance(name, str) or name not in table:
        known = ", ".join(sorted(table))
        unknown = PydanticCustomError(
            "unknown_name",
            "unknown {key} {name}; known: {known}",
            {"key": key, "name": repr(name), "known": known},
        )
        raise ValidationError.from_exception_data(
            base.__name__, [InitErrorDetails(type=unknown, loc=(key,), input=name)]
        )
    if info.mode == "json":  # where strict mode takes a text for a path
        return table[name].model_validate_json(json.dumps(data), strict=True)
    return table[name].model_validate(data)
