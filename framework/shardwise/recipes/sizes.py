"""How a stage is laid out so that it fits: ZeRO stage, recompute, tensor and, where those are not
enough, context and pipeline parallelism, micro-batch.

Every candidate is held against `shardwise.memory`, by way of the same numbers that a run prints.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from shardwise.config.run import RunConfig
from shardwise.errors import ConfigError
from shardwise.recipes.machine import GIB, Machine
from shardwise.stages.arithmetic import bytes_a_rank
from shardwise.stages.run import check_stage

# Tokens of a micro-batch from which on a machine's products are near their rate; more only fill
# its memory.
TOKENS = {"cpu": 2048, "cuda": 16384}
# Under this part of it a layout that divides more is worth its traffic.
ENOUGH = 1 / 4
TENSOR = (1, 2, 4, 8)  # ranks of one machine
CUTS = (1, 2, 4, 8)  # of rows by context parallelism, of layers by pipelines


@dataclasses.dataclass(frozen=True)
class Size:
    """One way to compute a stage; ``layout`` as recipes write it, for any number of data ranks."""

    layout: str
    recompute: str
    micro_batch: int
    data_ranks: int
    bytes_a_rank: int

    @property
    def gib(self) -> str:
        """For a sentence."""
        return f"{self.bytes_a_rank / GIB:.2f} GiB"


def sized(run: RunConfig, size: Size) -> RunConfig:
    """A run of one stage, computed so."""
    stage = run.training[0]
    engine = stage.engine.model_copy(update={"layout": size.layout, "recompute": size.recompute})
    batch = stage.batch.model_copy(update={"micro_batch": size.micro_batch})
    stage = stage.model_copy(update={"engine": engine, "batch": batch})
    return run.model_copy(update={"engine": engine, "stages": [stage]})


def occupied(run: RunConfig, machine: Machine, row: int) -> int:
    """Bytes of a rank, at most; ``row``: tokens of the longest row."""
    device = torch.device(machine.device)
    stage = run.training[0]
    engine = stage.engine.model_copy(update={"precision": machine.precision})
    stage = stage.model_copy(update={"engine": engine})
    return bytes_a_rank(run, stage, machine.ranks, row, device)


def choose(run: RunConfig, machine: Machine, row: int) -> Size | None:
    """How to compute the stage of ``run``, whose global batch stands; None: it fits in no way.

    Data and tensor parallelism, if they are enough; else rows or layers are cut, too.
    """
    return _first(run, machine, row, _ways(run, machine)) or _first(
        run, machine, row, _cut_ways(run, machine)
    )


def _first(run: RunConfig, machine: Machine, row: int, ways: Iterator[Size]) -> Size | None:
    """The first of ``ways`` with a micro-batch that is large enough, or the largest."""
    best: Size | None = None
    for way in ways:
        if occupied(sized(run, way), machine, row) > machine.budget:
            continue
        wanted = _wanted(run.training[0], machine, row, way.data_ranks)
        for micro in _halves(wanted):
            size = dataclasses.replace(way, micro_batch=micro)
            needed = occupied(sized(run, size), machine, row)
            if needed <= machine.budget:
                size = dataclasses.replace(size, bytes_a_rank=needed)
                if micro >= ENOUGH * wanted:
                    return size
                if best is None or micro > best.micro_batch:
                    best = size
                break
    return best


def least(run: RunConfig, machine: Machine, row: int) -> int:
    """Bytes that the most frugal way needs on a rank."""
    ways = itertools.chain(_ways(run, machine), _cut_ways(run, machine))
    return min(occupied(sized(run, way), machine, row) for way in ways)


def _wanted(stage: Any, machine: Machine, row: int, data_ranks: int) -> int:
    """Rows of a micro-batch: no more than a data rank has, or than fill the machine's products."""
    own = -(-stage.batch.global_batch // data_ranks)
    return int(max(1, min(own, TOKENS[machine.device] // row)))


def _halves(number: int) -> Iterator[int]:
    """Powers of two from the greatest that is not above ``number`` down to 1."""
    power = 1 << (number.bit_length() - 1)
    while power:
        yield power
        power >>= 1


def _ways(run: RunConfig, machine: Machine, cuts: int = 1, stages: int = 1) -> Iterator[Size]:
    """Layouts that the stage can have, the cheapest in traffic and recomputation first.

    ``cuts``: ranks that share a row; ``stages``: of a pipeline.
    """
    ranks = machine.ranks
    zeros = ("auto", "zero2", "zero3") if ranks > 1 else ("auto",)
    for tensor, recompute, zero in itertools.product(TENSOR, ("none", "full"), zeros):
        if ranks % (tensor * cuts * stages):
            continue
        parts = [f"tp{tensor}", "sp"] if tensor > 1 else []
        parts += [f"cp{cuts}"] if cuts > 1 else []
        parts += [f"pp{stages}"] if stages > 1 else []
        layout = ".".join([*parts, *([] if zero == "auto" and parts else [zero])])
        size = Size(layout, recompute, 1, ranks // (tensor * cuts * stages), 0)
        if _can_be(sized(run, size), ranks):
            yield size


def _cut_ways(run: RunConfig, machine: Machine) -> Iterator[Size]:
    """The same with rows cut, layers, or both: those of the fewest parts first."""
    pairs = itertools.product(CUTS, CUTS)
    for cuts, stages in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1])):
        if 1 < cuts * stages <= machine.ranks:
            yield from _ways(run, machine, cuts, stages)


def _can_be(run: RunConfig, ranks: int) -> bool:
    try:
        check_stage(run, run.training[0], ranks)
    except ConfigError:
        return False
    return True
