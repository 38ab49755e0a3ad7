"""From rows of trees to an engine's micro-batches, and from its outputs to every rank.

A rollout, or a batch of rankings, is known whole on every rank: it is tokens and a few numbers a
token, thousands of times less than activations. What a layout cuts is the computation. So each
engine, whatever its layout and placement, takes its own share of the same rows, and statistics
over the global batch (whitening, group advantages) are what one process computes.
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
from shardwise.parallel.collectives import gather_json
from shardwise.stages.base import data_shard

Output = Callable[[Any, MicroBatch], Tensor]


class Rows(Protocol):
    """Rows of which micro-batches can be made; each row has branches, each with valid tokens."""

    def sizes(self) -> list[list[int]]:
        """Valid tokens of every branch of every row."""
        ...

    def collate(self, rows: Sequence[int], num_real: int) -> MicroBatch:
        """Some rows, of which those from ``num_real`` on carry no loss."""
        ...


def local_batches(rows: Rows, engine: Engine, micro_batch: int) -> list[MicroBatch]:
    """This rank's share of the rows, in micro-batches; every data rank gets as many."""
    mine, real = data_shard(len(rows.sizes()), engine)
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


def exchange(rows: Rows, engine: Engine, share: np.ndarray) -> list[list[np.ndarray]]:
    """From the data ranks' parts, every branch's values, float64, on every rank of the world."""
    sizes = rows.sizes()
    starts = np.cumsum([0, *(sum(branches) for branches in sizes)])
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


def same_shares(one: Engine, other: Engine) -> bool:
    """Whether every rank computes the same rows in both; a collective call."""
    alike = (one.data_rank, one.data_size) == (other.data_rank, other.data_size)
    assert dist.group.WORLD is not None
    return all(gather_json(alike, dist.group.WORLD))


def hand_over(
    rows: Rows, giver: Engine, taker: Engine, share: np.ndarray, width: int, *, alike: bool
) -> np.ndarray:
    """From one engine's `forward_shard` [n, ``width``], the values at the other's valid tokens.

    ``alike``: by `same_shares`; then nothing is sent. A collective call.
    """
    if alike:
        return share
    sizes = [sum(branches) for branches in rows.sizes()]
    starts = np.cumsum([0, *sizes])
    flat = np.zeros((starts[-1], width))
    if len(first := data_shard(len(sizes), giver)[0]):
        flat[starts[first[0]] : starts[first[0]] + len(share)] = share
    # Each number comes from one data rank, zeros from the others: a sum is a copy.
    whole = np.array(giver.sum_over_data(flat.ravel().tolist())).reshape(flat.shape)
    own, real = data_shard(len(sizes), taker)
    return whole[starts[own[0]] : starts[own[0] + real]] if real else whole[:0]
