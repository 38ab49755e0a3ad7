"""What a stage of reinforcement learning is about to do, in numbers, on one screen."""

from __future__ import annotations

import dataclasses
from typing import Any

from shardwise import memory
from shardwise.adapters.registry import build_adapter
from shardwise.config.optimizers import SgdConfig
from shardwise.config.run import RunConfig
from shardwise.memory.formulas import gradients
from shardwise.memory.optimizers import KINDS
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.layout import Layout
from shardwise.parallel.memory_inputs import model_shape, place_of
from shardwise.parallel.mesh import pick_device
from shardwise.precision.policy import precision_of
from shardwise.stages.base import (
    ACTOR,
    REFERENCE,
    SCORERS,
    role_layout,
    role_of,
    roles_of,
    shares_base,
    trained_of,
)

TRAINED = (ACTOR, "critic")


@dataclasses.dataclass(frozen=True)
class RoleNumbers:
    """One role: where it is, what a rank of it does in an update, and what it holds."""

    role: str
    ranks: str
    layout: str
    parameters: int
    micro_batches: int  # of a data rank, an update
    bytes_a_rank: int  # the most of any pipeline rank, by `shardwise.memory`


def roles_in_use(stage: Any) -> list[str]:
    """The roles that the stage's settings ask for."""
    return [role for role in roles_of(stage) if role not in stage.unused_roles]


def role_numbers(run: RunConfig, stage: Any, role: str, world_size: int, row: int) -> RoleNumbers:
    """See `RoleNumbers`. ``row``: tokens of the longest row of an update."""
    config = role_of(stage, role)
    layout = role_layout(config, world_size)
    model = run.model
    assert isinstance(model, DecoderConfig)
    model = model.as_scalar() if role in SCORERS else model
    prompts = stage.batch.global_batch // stage.updates_per_rollout
    share = -(-prompts // layout.dp)
    batches = -(-share // stage.batch.micro_batch)
    names = "all" if config.ranks is None else ", ".join(map(str, config.ranks))
    said = trained_of(stage, role).adapter
    adapted = None if said is None else build_adapter(said, model).shape()
    shape = model_shape(model, adapted)
    most = max(
        _bytes(model, shape, stage, role, layout, rank, (row, batches)) for rank in range(layout.pp)
    )
    return RoleNumbers(role, names, str(layout), model.num_parameters(), batches, most)


def _bytes(
    model: DecoderConfig,
    shape: memory.ModelShape,
    stage: Any,
    role: str,
    layout: Layout,
    rank: int,
    rows: tuple[int, int],  # tokens of one, and micro-batches of them
) -> int:
    (row, batches), config = rows, role_of(stage, role)
    precision = precision_of(config.engine.precision, pick_device(config.engine.device))
    work = memory.Work(
        seq_len=row,
        micro_batch=stage.batch.micro_batch,
        micro_batches=batches,
        compute_bytes=precision.compute.itemsize,
        master_bytes=precision.master.itemsize,
        recompute=getattr(config.engine, "recompute", "none"),  # not every kind of engine does
        wide_logits=True,
    )
    place = place_of(model, layout, rank, batches)
    optimizer = config.optimizer or stage.optimizer
    kind = optimizer.kind if optimizer.kind in KINDS else "adamw"  # of another package
    if isinstance(optimizer, SgdConfig) and optimizer.momentum == 0:
        kind = "plain_sgd"
    found = memory.occupancy(shape, place, work, kind)
    if role == REFERENCE and shares_base(stage):
        return gradients(shape, place, work)  # as much as is trained: its copy of the adapter
    if role not in TRAINED:
        return found.master_shards + found.compute_copies
    at_backward = found.peak_gradients + found.activations + found.buffers
    steady = found.master_shards + found.compute_copies + found.optimizer_states
    return steady + max(at_backward, found.gradients)


def arithmetic(run: RunConfig, stage: Any, world_size: int, row: int) -> str:
    """The screen; ``row``: tokens of the longest row, a prompt with all its completions."""
    prompts, samples = stage.batch.global_batch, stage.samples_per_prompt
    cuts, epochs, steps = stage.updates_per_rollout, stage.epochs_per_rollout, stage.steps
    longest = stage.sampling.max_new_tokens
    lines = [
        f"{stage.name}: {steps} steps of one rollout each",
        f"  a rollout: {prompts} prompts x {samples} samples = {prompts * samples} completions "
        f"of at most {longest} tokens ({prompts * samples * longest:,}); rows of at most {row}",
        f"  its updates: {cuts} mini-batches of {prompts // cuts} prompts "
        f"({prompts * samples // cuts} completions) x {epochs} epochs = {cuts * epochs}",
        f"  in all: {steps * prompts * samples:,} completions, {steps * cuts * epochs:,} updates, "
        f"{steps * prompts / stage.num_problems:.2f} times through {stage.num_problems:,} problems",
        f"  {'role':<10} {'ranks':<10} {'layout':<22} {'parameters':>11} "
        f"{'micro-batches':>14} {'memory a rank':>14}",
    ]
    total = 0
    for role in roles_in_use(stage):
        n = role_numbers(run, stage, role, world_size, row)
        total += n.bytes_a_rank
        work = f"{n.micro_batches} x {stage.batch.micro_batch}"
        lines.append(
            f"  {n.role:<10} {n.ranks:<10} {n.layout:<22} {n.parameters:>11,} "
            f"{work:>14} {n.bytes_a_rank / 1e9:>11.3f} GB"
        )
    lines.append(f"  on a rank that holds every role: at most {total / 1e9:.3f} GB")
    return "\n".join(lines)
