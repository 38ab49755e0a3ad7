"""Whether a run's stages may have the numbers of steps that its recipe now gives them.

A stage that runs, or is finished, may be given more (`optim.schedules` says what that means). Fewer
than it has done cannot be, nor more for one that a later stage has already been trained from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardwise import checkpoint
from shardwise.checkpoint.steps import step_of
from shardwise.config.run import RunConfig
from shardwise.config.schema import StageConfig
from shardwise.errors import ConfigError, ShardwiseError
from shardwise.stages.base import checkpoint_root


def check_lengths(run: RunConfig, named: Callable[[str], str]) -> None:
    """Hold the recipe against the checkpoints in the run's folder.

    ``named`` gives a key with its source. Raises ConfigError, before anything is started.
    """
    newest = {
        s.name: checkpoint.latest(checkpoint_root(run.directory, s.name)) for s in run.training
    }
    for i, stage in run.training_stages():
        path = newest[stage.name]
        if path is None:
            continue
        done, key = step_of(path), named(f"stages.{i}.steps")
        if done > stage.steps:
            raise ConfigError(
                f"{key}: {stage.steps}, but stage {stage.name} has done {done} (in "
                f"{run.directory}); give {done} or more, or start afresh with another run_dir or "
                "stage name"
            )
        if done == stage.steps:
            continue
        for later in (s for n, s in run.training_stages() if n > i):
            made = newest[later.name]
            if made is not None and _rests_on(later, _meta(made), stage):
                raise ConfigError(
                    f"{key}: {stage.steps}, but stage {later.name} was trained from the "
                    f"checkpoint of its step {done}; more steps would take its start away. Keep "
                    f"{done}, or give stage {later.name} another name to train it again"
                )


def _meta(path: Path) -> Mapping[str, Any]:
    try:
        return checkpoint.read_meta(path)
    except ShardwiseError:  # damaged: whoever loads it says so
        return {}


def _rests_on(stage: StageConfig, meta: Mapping[str, Any], earlier: StageConfig) -> bool:
    """Whether a stage's checkpoints come from ``earlier``: by their parent, or by a role's."""
    parent = str(meta.get("lineage", {}).get("parent", ""))
    if parent.startswith(f"stages/{earlier.name}/"):
        return True
    roles = getattr(stage, "roles", None)
    said = [getattr(roles, name) for name in type(roles).model_fields] if roles else []
    if earlier.name in {role.init_from for role in said if role is not None}:
        return True
    return bool(said) and earlier.head == "scalar"  # the default of reward model and critic
