"""Whether a stage's model can have what the stage asks to be trained of it."""

from __future__ import annotations

from collections.abc import Callable

from shardwise.adapters.trained import EVERYTHING, names_by_part
from shardwise.config.run import RunConfig
from shardwise.config.schema import OptimizerConfig, StageConfig
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.optim.build import check_groups
from shardwise.parallel.layout import Layout
from shardwise.parallel.pipeline import chunks_of
from shardwise.stages.base import ACTOR, SCORERS, role_of, roles_of, trained_of


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
