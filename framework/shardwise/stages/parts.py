"""Whether a stage's model can have what the stage asks to be trained of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwise import checkpoint
from shardwise.adapters.trained import EVERYTHING, names_by_part
from shardwise.checkpoint.convert import RUN_FILE, STAGE_FILE
from shardwise.config import yaml12
from shardwise.config.paths import expand
from shardwise.config.run import RunConfig
from shardwise.config.schema import JobConfig, OptimizerConfig, StageConfig
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.optim.build import check_groups
from shardwise.parallel.layout import Layout
from shardwise.parallel.pipeline import chunks_of
from shardwise.search.config import ProcessRewardModelConfig
from shardwise.stages.base import ACTOR, SCORERS, TEACHER, role_of, roles_of, trained_of
from shardwise.stages.initial_weights import is_native


def check_parts(run: RunConfig, stage: StageConfig, key: str, named: Callable[[str], str]) -> None:
    """Refuse an adapter, frozen parts and groups of parameters that the models cannot have.

    ``key``: of the stage; ``named`` adds its source to a key. Raises ConfigError.
    """
    for role in roles_of(stage):
        if role != "critic" and role_of(stage, role).adapter is not None:
            raise ConfigError(
                f"{named(f'{key}.roles.{role}.adapter')}: a critic alone has one of its own; the "
                f"actor's is {key}.adapter, and a reference starts with it"
            )
    check_scorer(run, stage, key, named)
    if TEACHER in roles_of(stage) and role_of(stage, TEACHER).init_from is None:
        raise ConfigError(
            f"{named(f'{key}.roles.teacher.init_from')}: whom to learn from is not said; name an "
            "earlier stage, a checkpoint or a model folder"
        )
    trained: list[tuple[str, OptimizerConfig | None, str]] = [(ACTOR, stage.optimizer, "")]
    if "critic" in roles_of(stage):
        trained.append(("critic", role_of(stage, "critic").optimizer, "roles.critic."))
    for role, optimizer, before in trained:
        try:
            [names] = names_by_part(trained_of(stage, role), _model(run, stage, role), 1)
        except ConfigError as error:
            wrong, _, what = str(error).partition(": ")
            raise ConfigError(f"{named(f'{key}.{before}{wrong}')}: {what}") from error
        if optimizer is not None and optimizer.groups:
            check_groups(optimizer, names, named(f"{key}.{before}optimizer.groups"))


def check_scorer(run: RunConfig, stage: Any, key: str, named: Callable[[str], str]) -> None:
    """Refuse a reward model of this run that is read otherwise than it was trained."""
    if "reward" not in roles_of(stage) or "reward" in stage.unused_roles:
        return
    earlier = {s.name: s for s in run.training[: run.training.index(stage)]}
    models = [name for name, s in earlier.items() if s.head == "scalar"]
    name = role_of(stage, "reward").init_from or (models[-1] if models else "")
    if name not in earlier or earlier[name].scores_steps == (stage.reward_steps is not None):
        return
    where = named(f"{key}.reward_steps")
    if stage.reward_steps is None:
        raise ConfigError(
            f"{where}: stage {name} trains a model that scores steps; say how they become one "
            "score, for example reward_steps={aggregate: min}, or name another by roles.reward"
        )
    raise ConfigError(
        f"{where}: stage {name} trains a model that scores answers, not steps; leave it out, or "
        "name a stage of kind process_reward by roles.reward.init_from"
    )


def check_step_scorer(
    run: RunConfig, job: JobConfig, key: str, named: Callable[[str], str], *, files: bool
) -> None:
    """Refuse a process reward model whose steps a search cuts otherwise than it was trained.

    It is a stage's, or (``files``: it lies here) a checkpoint's that carries its recipe.
    """
    scorer = getattr(job, "scorer", None)
    if not isinstance(scorer, ProcessRewardModelConfig):
        return
    stages: list[Any] = [s for s in run.training if s.name == scorer.model]
    if stages:
        trained = stages[0].data.separator if stages[0].scores_steps else None
    else:
        trained = _trained_separator(Path(expand(scorer.model))) if files else None
    if trained not in (None, scorer.steps.separator):
        raise ConfigError(
            f"{named(f'{key}.scorer.steps.separator')}: {scorer.steps.separator!r}, and "
            f"{scorer.model} was trained with data.separator {trained!r}; write {trained!r}, in "
            "step.separator, too, or train it with the other"
        )


def _trained_separator(place: Path) -> str | None:
    """What ended a step where a checkpoint was trained; None where no recipe says it."""
    if not place.is_dir() or not is_native(place):
        return None
    files = checkpoint.read_files(place)
    if not {RUN_FILE, STAGE_FILE} <= files.keys():
        return None
    recipe = yaml12.parse(files[RUN_FILE].decode(), f"{place}/{RUN_FILE}").data
    name = json.loads(files[STAGE_FILE])["stage"]
    trained = {s["name"]: s for s in recipe["stages"] if s["kind"] == "process_reward"}
    found: str | None = trained[name]["data"]["separator"] if name in trained else None
    return found


def _model(run: RunConfig, stage: StageConfig, role: str) -> DecoderConfig:
    assert isinstance(run.model, DecoderConfig)
    scalar = role in SCORERS or stage.head == "scalar"
    return run.model.as_scalar() if scalar else run.model


def check_pipeline(run: RunConfig, stage: StageConfig, layout: Layout) -> None:
    """Refuse pipeline ranks without anything to train. Raises ConfigError."""
    trained = trained_of(stage, ACTOR)
    if layout.pp == 1 or trained == EVERYTHING:
        return
    parts = names_by_part(trained, _model(run, stage, ACTOR), layout.num_chunks)
    for rank in range(layout.pp):
        if not any(parts[chunk] for chunk in chunks_of(layout, rank)):
            what = "freeze" if trained.adapter is None else "adapter.targets"
            raise ConfigError(
                f"engine.layout: {layout} leaves pipeline rank {rank} nothing to train, as {what} "
                "has it; take fewer pipeline ranks, or train more"
            )
