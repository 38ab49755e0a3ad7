"""How long a recipe will take, and what that is said of; the same rule as a run's own estimate."""

from __future__ import annotations

from typing import Literal

import torch

from shardwise.config.run import RunConfig
from shardwise.metrics.gemm import measured_rate
from shardwise.metrics.progress import duration
from shardwise.recipes.facts import Facts
from shardwise.stages.estimate import DECODE, ROWS, Looked, estimate


def rate(precision: str, device: Literal["cpu", "cuda"]) -> float:
    """FLOP/s of this process's matrix products: on a CPU all cores', else one GPU's."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return measured_rate(dtype, torch.device(device))


def seconds_of(run: RunConfig, facts: Facts) -> float | None:
    """Of the one stage of ``run`` and its evaluations; None: the ranks are not here, or unknown."""
    machine, stage = facts.machine, run.training[0]
    if not machine.here:
        return None
    flops = rate(machine.precision, machine.device)
    flops *= machine.ranks if machine.device == "cuda" else 1
    looked = Looked(facts.lengths.rows, float(facts.lengths.row.mean()))
    rates: dict[str, float] = {stage.engine.precision: flops}
    return estimate(run, facts.start.tokenizer, rates, machine.ranks, {}, looked)[stage.name]


def words(seconds: float | None, facts: Facts) -> str:
    """The estimate and what it assumes, or why there is none."""
    machine = facts.machine
    if not machine.here:
        return "duration: said when it is started, since its ranks are not here"
    if seconds is None:
        return "duration: cannot be told from its data"
    each = " each" if machine.device == "cuda" and machine.ranks > 1 else ""
    return (
        f"duration: about {duration(seconds)} here, if rows are computed at {ROWS:.0%} and answers "
        f"written at {DECODE:.0%} of {rate(machine.precision, machine.device) / 1e9:.0f} "
        f"GFLOP/s{each}, measured now, and nothing else runs"
    )
