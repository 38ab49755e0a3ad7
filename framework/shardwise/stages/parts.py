"""Whether a stage's model can have what the stage asks to be trained of it."""

from __future__ import annotations

from collections.abc import Callable

from shardwise.adapters.trained import EVERYTHING, names_by_part
from shardwise.config.run import RunConfig
from shardwise.config.schema import StageConfig
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
    critics = "critic" in roles_of(stage)
    own = role_of(stage, "critic").optimizer if critics else None
    for optimizer, role, where in (
        (stage.optimizer, ACTOR, "optimizer.groups"),
        (own, "critic", "roles.critic.optimizer.groups"),
    ):
        try:
            [names] = names_by_part(trained_of(stage, role), _model(run, stage, role), 1)
        except ConfigError as error:
            wrong, _, what = str(error).partition(": ")
            raise ConfigError(f"{named(f'{key}.{wrong}')}: {what}") from error
        if optimizer is not None and optimizer.groups:
            check_groups(optimizer, names, named(f"{key}.{where}"))


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
