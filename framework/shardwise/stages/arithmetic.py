"""What a stage is about to hold on a rank; one of reinforcement learning in full, on one screen."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from shardwise import memory
from shardwise.adapters.registry import build_adapter
from shardwise.config.optimizers import SgdConfig
from shardwise.config.run import RunConfig
from shardwise.config.schema import RoleConfig
from shardwise.memory.formulas import gradients
from shardwise.memory.optimizers import KINDS
from shardwise.memory.serving import cache, served_weights
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.memory_inputs import model_shape, place_of
from shardwise.parallel.mesh import pick_device
from shardwise.precision.policy import precision_of
from shardwise.rewards.tasks import count
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
    steady_bytes: int  # of those, what is there all the time


def roles_in_use(stage: Any) -> list[str]:
    """The roles that the stage's settings ask for."""
    return [role for role in roles_of(stage) if role not in stage.unused_roles]


def bytes_a_rank(
    run: RunConfig, stage: Any, world_size: int, row: int, device: torch.device | None = None
) -> int:
    """The most of a rank that holds every role, what generates included; see `role_numbers`."""
    numbers = [role_numbers(run, stage, r, world_size, row, device) for r in roles_in_use(stage)]
    steady = sum(n.steady_bytes for n in numbers)
    turns = [n.bytes_a_rank - n.steady_bytes for n in numbers]  # one role is updated at a time
    if stage.on_policy:
        assert isinstance(run.model, DecoderConfig)
        work = _work(stage, role_of(stage, ACTOR), row, 1, device)
        model, samples = model_shape(run.model), stage.samples_per_prompt
        said = stage.rollout
        prompts = -(-stage.batch.global_batch * said.tp // world_size)  # of a generator
        rows = min(prompts * samples, said.max_slots)
        length = row - (samples - 1) * stage.sampling.max_new_tokens
        steady += served_weights(model, work, said.tp)
        turns.append(cache(model, work, rows, length, said.tp, said.max_cache_tokens))
    return steady + max(turns)


def role_numbers(
    run: RunConfig,
    stage: Any,
    role: str,
    world_size: int,
    row: int,
    device: torch.device | None = None,
) -> RoleNumbers:
    """See `RoleNumbers`. ``row``: tokens of the longest row of an update.

    ``device``: where it will be, if not what this machine would take.
    """
    config = role_of(stage, role)
    layout = role_layout(config, world_size)
    model = run.model
    assert isinstance(model, DecoderConfig)
    model = model.as_scalar() if role in SCORERS or stage.head == "scalar" else model
    rows = stage.batch.global_batch // getattr(stage, "updates_per_rollout", 1)
    share = -(-rows // layout.dp)
    batches = -(-share // stage.batch.micro_batch)
    names = "all" if config.ranks is None else ", ".join(map(str, config.ranks))
    said = trained_of(stage, role).adapter
    adapted = None if said is None else build_adapter(said, model).shape()
    shape = model_shape(model, adapted)
    work = _work(stage, config, row, batches, device)
    most = max(
        _bytes(shape, stage, role, place_of(model, layout, rank, batches), work)
        for rank in range(layout.pp)
    )
    return RoleNumbers(role, names, str(layout), model.num_parameters(), batches, *most)


def _work(
    stage: Any, role: RoleConfig, row: int, batches: int, device: torch.device | None
) -> memory.Work:
    device = device or pick_device(role.engine.device)
    precision = precision_of(role.engine.precision, device)
    return memory.Work(
        seq_len=row,
        micro_batch=stage.batch.micro_batch,
        micro_batches=batches,
        compute_bytes=precision.compute.itemsize,
        master_bytes=precision.master.itemsize,
        recompute=getattr(role.engine, "recompute", "none"),  # not every kind of engine does
        wide_logits=stage.exact_logprobs,
        device="cuda" if device.type == "cuda" else "cpu",
    )


def _bytes(
    shape: memory.ModelShape, stage: Any, role: str, place: memory.Place, work: memory.Work
) -> tuple[int, int]:
    """(the most, what is there all the time) of one rank."""
    optimizer = role_of(stage, role).optimizer or stage.optimizer
    kind = optimizer.kind if optimizer.kind in KINDS else "adamw"  # of another package
    if isinstance(optimizer, SgdConfig) and optimizer.momentum == 0:
        kind = "plain_sgd"
    found = memory.occupancy(shape, place, work, kind)
    if role == REFERENCE and shares_base(stage):
        own = gradients(shape, place, work)  # as much as is trained: its copy of the adapter
        return own, own
    frozen = found.master_shards + found.compute_copies
    if role not in TRAINED:
        return frozen, frozen
    at_backward = found.peak_gradients + found.activations + found.buffers
    steady = frozen + found.optimizer_states
    return steady + max(at_backward, found.gradients), steady


def arithmetic(run: RunConfig, stage: Any, world_size: int, row: int) -> str:
    """The screen; ``row``: tokens of the longest row, a prompt with all its completions."""
    prompts, samples = stage.batch.global_batch, stage.samples_per_prompt
    cuts, epochs, steps = stage.updates_per_rollout, stage.epochs_per_rollout, stage.steps
    longest = stage.sampling.max_new_tokens
    problems = count(stage.task, "train_rl", stage.num_problems)
    lines = [
        f"{stage.name}: {steps} steps of one rollout each",
        f"  a rollout: {prompts} prompts x {samples} samples = {prompts * samples} completions "
        f"of at most {longest} tokens ({prompts * samples * longest:,}); rows of at most {row}",
        f"  its updates: {cuts} mini-batches of {prompts // cuts} prompts "
        f"({prompts * samples // cuts} completions) x {epochs} epochs = {cuts * epochs}",
        f"  in all: {steps * prompts * samples:,} completions, {steps * cuts * epochs:,} updates, "
        f"{steps * prompts / problems:.2f} times through {problems:,} problems",
        f"  {'role':<10} {'ranks':<10} {'layout':<22} {'parameters':>11} "
        f"{'micro-batches':>14} {'memory a rank':>14}",
    ]
    for role in roles_in_use(stage):
        n = role_numbers(run, stage, role, world_size, row)
        work = f"{n.micro_batches} x {stage.batch.micro_batch}"
        lines.append(
            f"  {n.role:<10} {n.ranks:<10} {n.layout:<22} {n.parameters:>11,} "
            f"{work:>14} {n.bytes_a_rank / 1e9:>11.3f} GB"
        )
    most = bytes_a_rank(run, stage, world_size, row)
    lines.append(f"  on a rank that holds every role, and generates: at most {most / 1e9:.3f} GB")
    return "\n".join(lines)
