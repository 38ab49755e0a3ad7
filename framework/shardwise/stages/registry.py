"""Stages and evaluations by name. Another package adds its own by the entry-point group
``shardwise.stages``, whose target is imported and calls `register_stage`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardwise.config.registry import register_evaluation_config, register_stage_config
from shardwise.config.schema import EvaluationConfig, StageConfig
from shardwise.stages import accuracy, bits, continuations, grpo, ppo, pretrain, reward, sft
from shardwise.stages.base import Stage, StageContext

STAGES: dict[str, Callable[[StageContext], Stage]] = {}
EVALUATIONS: dict[str, Callable[..., dict[str, Any]]] = {}


def register_stage(
    kind: str, config: type[StageConfig], build: Callable[[StageContext], Stage]
) -> None:
    """Make ``stages[i].kind: <kind>`` known: its config class, and what builds it."""
    register_stage_config(kind, config)
    STAGES[kind] = build


def register_evaluation(
    kind: str, config: type[EvaluationConfig], evaluate: Callable[..., dict[str, Any]]
) -> None:
    """Make ``evaluations[i].kind: <kind>`` known: ``evaluate(config, ctx, engine)``."""
    register_evaluation_config(kind, config)
    EVALUATIONS[kind] = evaluate


register_stage("pretrain", pretrain.PretrainConfig, pretrain.PretrainStage)
register_stage("sft", sft.SftConfig, sft.SftStage)
register_stage("reward", reward.RewardModelConfig, reward.RewardStage)
register_stage("grpo", grpo.GrpoConfig, grpo.GrpoStage)
register_stage("ppo", ppo.PpoConfig, ppo.PpoStage)
register_evaluation("bits_per_byte", bits.BitsConfig, bits.evaluate)
register_evaluation("problems", accuracy.ProblemsConfig, accuracy.evaluate)
register_evaluation("continuations", continuations.ContinuationsConfig, continuations.evaluate)
