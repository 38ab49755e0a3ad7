"""A stage that goes on from another run's optimizer and step: `init_optimizer`.

The checkpoint is a native one: of an earlier run, or what `convert --to native` makes of
DeepSpeed's or Megatron's. Rates and rows are those of the step that it has reached; earlier rows
count as seen.
"""

from __future__ import annotations

from shardwise import checkpoint
from shardwise.checkpoint import manifest, steps
from shardwise.checkpoint.manifest import MismatchError
from shardwise.config.run import RunConfig
from shardwise.config.schema import StageConfig
from shardwise.engines.base import Engine
from shardwise.errors import ConfigError
from shardwise.stages.base import ACTOR, roles_of
from shardwise.stages.initial_weights import is_native

_CARRIED = ("updates", "skipped", "loss_scale")  # scales of FP8 begin anew


def check_taken_over(run: RunConfig, key: str) -> None:
    """Raise ConfigError, under ``key``, where no stage can go on from what ``init_from`` holds."""
    start, [first, *_] = run.start, run.stages
    assert start is not None
    if not isinstance(first, StageConfig) or roles_of(first) != [ACTOR] or first.adapter:
        raise ConfigError(
            f"{key}: stages.{first.name} cannot go on from another run's optimizer: the first "
            "stage must train a whole model, and no other role (pretrain and sft do); leave it out"
        )
    stored = manifest.read(checkpoint.resolve(start)).tensors if is_native(start) else {}
    if not any(name.startswith("optim.") for name in stored):
        raise ConfigError(
            f"{key}: {start} holds no optimizer's state; `shardwise convert RUN OUT --to native` "
            "keeps that of DeepSpeed's and Megatron's checkpoints"
        )
    if (done := steps.step_of(checkpoint.resolve(start))) >= first.steps:
        raise ConfigError(
            f"{key}: {start} has done {done} steps, and stages.{first.name}.steps is "
            f"{first.steps}, which counts them, too; give it more"
        )


def take_over(engine: Engine, run: RunConfig, stage: StageConfig) -> int:
    """Fill the optimizer's state; the step that it has reached. 0 for a stage that starts itself.

    A collective call. Raises MismatchError for an optimizer of another kind.
    """
    if not run.init_optimizer or stage.name != run.stages[0].name:
        return 0
    assert run.start is not None
    path, state = checkpoint.resolve(run.start), engine.state_dict()
    kept = {n: value for n, value in state.tensors.items() if n.startswith("optim.")}
    try:
        said = checkpoint.load(path, kept, partial=True).get("engine", {})
    except MismatchError as error:
        raise MismatchError(
            f"init_optimizer: stages.{stage.name}.optimizer keeps other states than what wrote the "
            f"checkpoint; write that one's kind, or leave init_optimizer out. {error}"
        ) from error
    engine.load_state_dict(dict(state.meta) | {k: said[k] for k in _CARRIED if k in said})
    return steps.step_of(path)
