"""Bytes of what an optimizer keeps on one rank, by kind, and of the gradients that it asks for.

Counters and the like, a few numbers a tensor, are left out.
"""

from __future__ import annotations

from shardwise.memory.parameters import (
    Matrix,
    block_matrices,
    end_matrices,
    learned,
    local,
    sharded,
    trained,
)
from shardwise.memory.shapes import ModelShape, Part, Place, Work

# Numbers in the masters' dtype that are kept a parameter.
NUMBERS = {
    "adamw": 2,
    "adam": 2,
    "sgd": 1,
    "plain_sgd": 0,  # without momentum
    "lion": 1,
    "schedule_free": 2,
    "lomo": 0,
}
FACTORED = ("adafactor", "adalomo")
FUSED = ("lomo", "adalomo")  # a gradient is gone before the next block's is there
KINDS = (*NUMBERS, "muon", *FACTORED, "adamw8bit")
BLOCK, LEAST = 256, 4096  # of 8-bit moments: elements of a block, and of the smallest tensor


def optimizer_states(model: ModelShape, place: Place, work: Work, optimizer: str) -> int:
    """Bytes of states, for one of `KINDS`."""
    if optimizer in NUMBERS:
        return NUMBERS[optimizer] * work.master_bytes * trained(model, place)
    matrices = learned(block_matrices(model, place))
    block = sum(_bytes(optimizer, m, place, work, m.columns == 1) for m in matrices)
    total, tables = 0, 0
    for part in place.parts:
        total += part.layers * block
        for m in learned(end_matrices(model, place, part)):
            tables += m.columns > 1
            # A tied embedding that one rank holds at both ends has one state.
            if m.columns == 1 or tables == 1 or not model.tied:
                total += _bytes(optimizer, m, place, work, True)
    return total


def _bytes(optimizer: str, matrix: Matrix, place: Place, work: Work, by_adamw: bool) -> int:
    """``by_adamw``: whether Muon leaves the matrix to AdamW."""
    own, size = matrix.shard(place.holders), work.master_bytes
    if optimizer == "muon":
        return (2 if by_adamw else 1) * size * own
    if optimizer in FACTORED:
        if matrix.columns == 1:
            return size * own
        return size * (-(-matrix.rows // place.holders) + matrix.columns)
    # Blocks are the whole tensor's, and every rank has what scales them.
    whole = matrix.elements * (1 if matrix.columns == 1 else place.tp)
    if whole < LEAST:
        return 2 * size * own
    return 2 * (own + size * -(-whole // BLOCK))


def fused_gradients(model: ModelShape, place: Place, work: Work) -> int:
    """The most that waits at once where weights move in the backward pass: a tensor's, or a
    block's, in the dtype that it came in, and as it is summed up.
    """
    c, m = work.compute_bytes, work.master_bytes
    block = learned(block_matrices(model, place))
    peak = 0
    for part in place.parts:
        ends = learned(end_matrices(model, place, part))
        groups = [[x] for x in (*block, *ends)] if place.alone else [block, ends]
        for group in groups:
            arriving = 0 if place.alone and c == m else c * local(group)
            peak = max(peak, arriving + m * sharded(group, place.holders))
    return peak


def table(model: ModelShape) -> str:
    """Markdown: bytes a parameter that one process keeps in fp32, states and gradients."""
    place = Place((Part(model.num_layers),))
    work = Work(seq_len=1, micro_batch=1, compute_bytes=4)
    number = trained(model, place)
    adamw = optimizer_states(model, place, work, "adamw")
    lines = ["| kind | states | of AdamW's | gradients |", "|---|---|---|---|"]
    for kind in KINDS:
        states = optimizer_states(model, place, work, kind)
        name = "sgd, momentum 0" if kind == "plain_sgd" else kind
        kept = fused_gradients(model, place, work) if kind in FUSED else 4 * number
        lines.append(
            f"| {name} | {states / number:.3f} | {states / adamw:.3f} | {kept / number:.3f} |"
        )
    return "\n".join(lines)
