"""Where rooms above announce their config classes, so that the loader can validate them.

The config room is the lowest, so it cannot import models or stages. They register here instead:
a model family by its ``family`` name, a stage or an evaluation by its ``kind``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

from shardwise.config.schema import EvaluationConfig, ModelConfig, StageConfig

MODEL_CONFIGS: dict[str, type[ModelConfig]] = {}
STAGE_CONFIGS: dict[str, type[StageConfig]] = {}
EVALUATION_CONFIGS: dict[str, type[EvaluationConfig]] = {}

# Who registers, by name: this room imports none of them. They import no torch.
PROVIDERS = ("shardwise.models.configs", "shardwise.stages.registry")
ENTRY_POINTS = "shardwise.stages"


def register_model_config(family: str, cls: type[ModelConfig]) -> None:
    """Make ``model.family: <family>`` validate against ``cls``."""
    MODEL_CONFIGS[family] = cls


def register_stage_config(kind: str, cls: type[StageConfig]) -> None:
    """Make ``stages[i].kind: <kind>`` validate against ``cls``."""
    STAGE_CONFIGS[kind] = cls


def register_evaluation_config(kind: str, cls: type[EvaluationConfig]) -> None:
    """Make ``evaluations[i].kind: <kind>`` validate against ``cls``."""
    EVALUATION_CONFIGS[kind] = cls


@functools.cache
def discover() -> None:
    """Let the rooms above, and other packages by entry point, register what they have."""
    for module in PROVIDERS:
        importlib.import_module(module)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry.load()
