"""From rows of trees to an engine's micro-batches, and from its outputs to every rank.

Each engine, whatever its layout and placement, takes its own share of the same rows, and statistics
over the global batch (whitening, group advantages) are what one process computes. Which rows a rank
holds `row_holders` says; rows of files are known whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine
from shardwise.stages.base import data_shard
from shardwise.stages.row_holders import Holders, move

Output = Callable[[Any, MicroBatch], Tensor]


class Rows(Protocol):
    """Rows of which micro-batches can be made; each row has branches, each with valid tokens."""

    def __len__(self) -> int: ...

    def sizes(self, row: int) -> list[int]:
        """Valid tokens of every branch of a row that this rank holds."""
        ...

    def collate(self, rows: Sequence[int], num_real: int) -> MicroBatch:
        """Some rows, of which those from ``num_real`` on carry no loss."""
        ...


def local_batches(rows: Rows, engine: Engine, micro_batch: int) -> list[MicroBatch]:
    """This rank's share of the rows, in micro-batches; every data rank gets as many."""
    mine, real = data_shard(len(rows), engine)
    return [
        rows.collate(mine[i : i + micro_batch].tolist(), max(0, real - i))
        for i in range(0, len(mine), micro_batch)
    ]


def forward_shard(batches: Sequence[MicroBatch], engine: Engine, fn: Output) -> np.ndarray:
    """This rank's values of ``fn(outputs, batch)`` [B, T, ...] at the valid tokens, in order."""
    found = [
        value.cpu()[batch.loss_mask_BT].double()
        for value, batch in zip(engine.forward(batches, fn), batches, strict=True)
    ]
    return torch.cat(found).numpy() if found else np.zeros(0)


def by_row(rows: Rows, engine: Engine, share: np.ndarray) -> dict[int, np.ndarray]:
    """This rank's `forward_shard` [n, ...], by row."""
    mine, real = data_shard(len(rows), engine)
    sizes = [sum(rows.sizes(int(i))) for i in mine[:real]]
    cuts = np.split(share, np.cumsum(sizes))  # behind them, what fills up a share has none
    return {int(i): cut for i, cut in zip(mine[:real], cuts)}


def exchange(rows: Rows, engine: Engine, share: np.ndarray) -> list[list[np.ndarray]]:
    """From the data ranks' parts, every branch's values, float64, on every rank of the world."""
    sizes = [rows.sizes(i) for i in range(len(rows))]
    starts = np.cumsum([0, *map(sum, sizes)])
    first = data_shard(len(sizes), engine)[0]
    flat = np.zeros(starts[-1])
    if len(first):
        flat[starts[first[0]] : starts[first[0]] + len(share)] = share
    # Each number comes from one data rank, zeros from the others: a sum is a copy.
    whole = np.array(engine.sum_over_data(flat.tolist()))
    cuts = np.cumsum([n for branches in sizes for n in branches])[:-1]
    parts = iter(np.split(whole, cuts))
    return [[next(parts) for _ in branches] for branches in sizes]


def measure(rows: Rows, engine: Engine, micro_batch: int, fn: Output) -> list[list[np.ndarray]]:
    """``fn(outputs, batch)`` [B, T] at the valid tokens of every branch, on every rank."""
    batches = local_batches(rows, engine, micro_batch)
    return exchange(rows, engine, forward_shard(batches, engine, fn))


def hand_over(
    rows: Rows, giver: Engine, share: np.ndarray, have: Holders, need: Holders
) -> dict[int, np.ndarray]:
    """From the data ranks' `forward_shard` with ``giver``, the numbers (flat, float64) of rows that
    this rank needs. A collective call.

    ``have``: the rows that each rank computes with ``giver``.
    """
    own = {i: values.reshape(-1) for i, values in by_row(rows, giver, share).items()}
    got = move({i: torch.from_numpy(v) for i, v in own.items()}, have, need, torch.float64)
    own |= {i: values.numpy() for i, values in got.items()}
    return {i: own[i] for i in sorted(need[dist.get_rank()])}
