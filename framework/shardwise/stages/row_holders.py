"""Which ranks need which rows of a batch, and rows on their way to them.

Every rank knows who has and who needs what, so nobody asks: a row goes, as a tensor, from one of
the ranks that have it to those that need it and have it not, all in one all-to-all. To all ranks
go statistics alone: sizes, rewards, sums.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.parallel.collectives import all_to_all_parts, gather_json, sum_parts
from shardwise.stages.base import DataRank, data_shard

AXIS = "rows"  # by which what is sent is counted

Holders = Sequence[Collection[int]]  # by rank of the world, rows of a batch


@dataclasses.dataclass
class _Place:
    data_rank: int
    data_size: int


class Shares:
    """Which rows of a batch each rank computes with an engine; made by a collective call."""

    def __init__(self, engine: DataRank) -> None:
        assert dist.group.WORLD is not None
        mine = [engine.data_rank, engine.data_size]
        self.places = [_Place(*said) for said in gather_json(mine, dist.group.WORLD)]

    def rows(self, size: int, parts: int = 1) -> list[set[int]]:
        """By rank, of ``size`` rows in ``parts`` mini-batches; with what only fills up a share."""
        each = size // parts
        starts = range(0, size, each)
        shards = [data_shard(each, place)[0] for place in self.places]
        return [{start + int(i) for start in starts for i in shard} for shard in shards]

    def computed(self, size: int) -> list[set[int]]:
        """By rank, of ``size`` rows those whose numbers it has."""
        shards = [data_shard(size, place) for place in self.places]
        return [{int(i) for i in mine[:real]} for mine, real in shards]


def union(*holders: Holders) -> list[set[int]]:
    """By rank, what any of them has."""
    return [set().union(*of_rank) for of_rank in zip(*holders, strict=True)]


def first_rank(rows: Collection[int]) -> list[Collection[int]]:
    """What the first rank of the world needs alone."""
    return [rows, *[()] * (dist.get_world_size() - 1)]


def move(
    rows: Mapping[int, Tensor], have: Holders, need: Holders, dtype: torch.dtype
) -> dict[int, Tensor]:
    """This rank's part of ``need`` that is not in its part of ``have``, from those that have it.

    ``rows``: those of this rank that others may need; 1-D, of ``dtype``. A collective call.
    """
    having: dict[int, list[int]] = defaultdict(list)
    for rank, some in enumerate(have):
        for row in some:
            having[row].append(rank)
    ways = [
        (having[row][taker % len(having[row])], taker, row)
        for taker, some in enumerate(need)
        for row in sorted(some)
        if taker not in having[row]
    ]
    if not ways:
        return {}
    group = dist.group.WORLD
    assert group is not None
    rank, world = dist.get_rank(), len(have)
    sent: list[list[int]] = [[] for _ in range(world)]
    wanted: list[list[int]] = [[] for _ in range(world)]
    for giver, taker, row in ways:
        if giver == rank:
            sent[taker].append(row)
        if taker == rank:
            wanted[giver].append(row)
    sizes = all_to_all_parts(
        [torch.tensor([len(rows[i]) for i in some], dtype=torch.int64) for some in sent],
        list(map(len, wanted)),
        group,
        AXIS,
    )
    nothing = torch.empty(0, dtype=dtype)
    found = all_to_all_parts(
        [torch.cat([nothing, *(rows[i] for i in some)]) for some in sent],
        [int(n.sum()) for n in sizes],
        group,
        AXIS,
    )
    return {
        row: part
        for some, of_rank, n in zip(wanted, found, sizes, strict=True)
        for row, part in zip(some, of_rank.split(n.tolist()), strict=True)
    }


class Sums:
    """Sums over all rows of a batch, each told by the first rank that holds it.

    They are the same to the bit on any number of ranks: within a row, and then by row.
    """

    def __init__(self, holders: Holders, rank: int) -> None:
        first: dict[int, int] = {}
        for number, some in enumerate(holders):
            for row in some:
                first.setdefault(row, number)
        self.mine = sorted(holders[rank])
        self.told = [first[row] == rank for row in self.mine]
        self.size = len(first)

    def of(self, of_rows: Sequence[np.ndarray]) -> float:
        """The sum of all numbers, given those of the rows that this rank holds, in order."""
        whole = np.zeros(self.size)
        for row, is_told, values in zip(self.mine, self.told, of_rows, strict=True):
            if is_told:
                whole[row] = values.sum()
        return float(sum_parts(torch.from_numpy(whole), dist.group.WORLD).numpy().sum())
