"""Stages and evaluations by name: their config classes now, what runs them when it is wanted.

Nothing here imports torch, so that reading a recipe does not. Another package adds its own by the
entry-point group ``shardwise.stages``, whose target is imported and calls `register_stage`; it
keeps commands without tensors fast by naming what runs as ``"module:name"``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shardwise.config.callbacks import CallbackConfig, StopWhenConfig
from shardwise.config.registry import (
    register_callback_config,
    register_evaluation_config,
    register_stage_config,
)
from shardwise.config.repeat import RepeatConfig, UntilConfig
from shardwise.config.schema import EvaluationConfig, JobConfig, StageConfig
from shardwise.stages.distill_config import DistillConfig
from shardwise.stages.dpo_config import DpoConfig
from shardwise.stages.evaluation_configs import (
    BitsConfig,
    ContinuationsConfig,
    LmEvalConfig,
    MultipleChoiceConfig,
    ProblemsConfig,
)
from shardwise.stages.filter_config import FilterConfig
from shardwise.stages.grpo_config import GrpoConfig
from shardwise.stages.online_dpo_config import OnlineDpoConfig
from shardwise.stages.ppo_config import PpoConfig
from shardwise.stages.pretrain_config import PretrainConfig
from shardwise.stages.process_reward_config import ProcessRewardConfig
from shardwise.stages.reward_config import RewardModelConfig
from shardwise.stages.search_config import LabelStepsConfig, SearchConfig
from shardwise.stages.sft_config import SftConfig

if TYPE_CHECKING:
    from shardwise.engines.base import Engine
    from shardwise.stages.base import Stage, StageContext
    from shardwise.stages.callbacks import Callback
    from shardwise.stages.jobs import Job

    Build = Callable[[StageContext], Stage]
    BuildJob = Callable[[StageContext], Job]
    BuildCallback = Callable[[Any], Callback]
    Evaluate = Callable[[Any, StageContext, Engine], dict[str, Any]]

_STAGES: dict[str, Build | str] = {}
_JOBS: dict[str, BuildJob | str] = {}
_CALLBACKS: dict[str, BuildCallback | str] = {}
_EVALUATIONS: dict[str, Evaluate | str] = {}


def register_stage(kind: str, config: type[StageConfig], build: Build | str) -> None:
    """Make ``stages[i].kind: <kind>`` known: its config class, and what builds it."""
    register_stage_config(kind, config)
    _STAGES[kind] = build


def register_job(kind: str, config: type[JobConfig], build: BuildJob | str) -> None:
    """Make ``stages[i].kind: <kind>`` known that trains nothing: its config, what builds it."""
    register_stage_config(kind, config)
    _JOBS[kind] = build


def register_evaluation(
    kind: str, config: type[EvaluationConfig], evaluate: Evaluate | str
) -> None:
    """Make ``evaluations[i].kind: <kind>`` known: ``evaluate(config, ctx, engine)``."""
    register_evaluation_config(kind, config)
    _EVALUATIONS[kind] = evaluate


def register_callback(kind: str, config: type[CallbackConfig], build: BuildCallback | str) -> None:
    """Make ``callbacks[i].kind: <kind>`` known: its config class, and what builds it."""
    register_callback_config(kind, config)
    _CALLBACKS[kind] = build


def build_callbacks(ctx: StageContext) -> list[Callback]:
    """Those that the run has for the stage of a context, in order."""
    name = ctx.stage.name
    configs = [c for c in ctx.run.callbacks if not c.stages or name in c.stages]
    return [_found(_CALLBACKS[config.kind])(config) for config in configs]


def build_stage(ctx: StageContext) -> Stage:
    """The stage of a context, ready to train; a collective call."""
    built: Stage = _found(_STAGES[ctx.stage.kind])(ctx)
    return built


def build_job(ctx: StageContext) -> Job:
    """The job of a context, ready to run; a collective call."""
    built: Job = _found(_JOBS[ctx.stage.kind])(ctx)
    return built


def run_evaluation(config: EvaluationConfig, ctx: StageContext, engine: Engine) -> dict[str, Any]:
    """What an evaluation measures on the weights of ``engine``; a collective call."""
    result: dict[str, Any] = _found(_EVALUATIONS[config.kind])(config, ctx, engine)
    return result


def _found(target: Any) -> Any:
    """The callable itself, or the one that ``"module:name"`` names."""
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


_HERE = "shardwise.stages"
register_stage("pretrain", PretrainConfig, f"{_HERE}.pretrain:PretrainStage")
register_stage("sft", SftConfig, f"{_HERE}.sft:SftStage")
register_stage("distill", DistillConfig, f"{_HERE}.distill:DistillStage")
register_stage("reward", RewardModelConfig, f"{_HERE}.reward:RewardStage")
register_stage("process_reward", ProcessRewardConfig, f"{_HERE}.process_reward:ProcessRewardStage")
register_stage("dpo", DpoConfig, f"{_HERE}.dpo:DpoStage")
register_stage("grpo", GrpoConfig, f"{_HERE}.grpo:GrpoStage")
register_stage("online_dpo", OnlineDpoConfig, f"{_HERE}.online_dpo:OnlineDpoStage")
register_stage("ppo", PpoConfig, f"{_HERE}.ppo:PpoStage")
register_job("search", SearchConfig, f"{_HERE}.search:SearchJob")
register_job("label_steps", LabelStepsConfig, f"{_HERE}.search:LabelStepsJob")
register_job("filter", FilterConfig, f"{_HERE}.filter_job:FilterJob")
register_job("repeat", RepeatConfig, f"{_HERE}.until:refuse")
register_job("until", UntilConfig, f"{_HERE}.until:UntilJob")
register_callback("stop_when", StopWhenConfig, f"{_HERE}.callbacks:StopWhen")
register_evaluation("bits_per_byte", BitsConfig, f"{_HERE}.bits:evaluate")
register_evaluation("problems", ProblemsConfig, f"{_HERE}.accuracy:evaluate")
register_evaluation("multiple_choice", MultipleChoiceConfig, f"{_HERE}.multiple_choice:evaluate")
register_evaluation("lm_eval", LmEvalConfig, f"{_HERE}.harness:evaluate")
register_evaluation("continuations", ContinuationsConfig, f"{_HERE}.continuations:evaluate")
