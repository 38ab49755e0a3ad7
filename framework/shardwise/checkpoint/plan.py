"""Who writes what: each region of each tensor once, spread evenly over the ranks that hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from shardwise.checkpoint.shards import DTYPE_NAMES, DTYPES
from shardwise.errors import CheckpointError
from shardwise.ops.local_shards import LocalShard, local_shards
from shardwise.ops.regions import Region, tiling_problem


@dataclasses.dataclass(frozen=True)
class Holding:
    """The regions of one tensor that a rank could write."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]

    def to_json(self) -> list[Any]:
        """Plain JSON, the inverse of `holding_from_json`."""
        return [self.name, self.dtype, self.shape, self.regions]


def holding_from_json(value: Sequence[Any]) -> Holding:
    """The inverse of `Holding.to_json`."""
    name, dtype, shape, regions = value
    return Holding(name, dtype, tuple(shape), tuple(Region(tuple(o), tuple(s)) for o, s in regions))


def holdings(tensors: Mapping[str, Tensor]) -> tuple[list[Holding], list[list[LocalShard]]]:
    """What this rank holds, and the memory behind it. Raises CheckpointError for non-tensors."""
    held, memory = [], []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise CheckpointError(f"{name!r} is not a name for a tensor")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name}: is a {type(tensor).__name__}, not a tensor; put it into `meta` as JSON"
            )
        if tensor.dtype not in DTYPE_NAMES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_NAMES)
            raise CheckpointError(f"{name}: {tensor.dtype} cannot be stored; known: {known}")
        parts = local_shards(name, tensor)
        memory.append(parts)
        regions = tuple(p.region for p in parts)
        held.append(Holding(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), regions))
    return held, memory


def assign(by_rank: Sequence[Sequence[Holding]]) -> list[list[tuple[int, int]]]:
    """For each rank, the (tensor index, region index) that it writes, in the order of its tensors.

    Of several ranks with the same region, the one with the fewest bytes so far writes it. Raises
    CheckpointError if ranks disagree about a tensor, or if its regions do not tile it.
    """
    first: dict[str, tuple[int, Holding]] = {}
    holders: dict[tuple[str, Region], list[tuple[int, int, int]]] = {}
    regions: dict[str, list[Region]] = {}
    for rank, held in enumerate(by_rank):
        for index, holding in enumerate(held):
            other, known = first.setdefault(holding.name, (rank, holding))
            if (known.dtype, known.shape) != (holding.dtype, holding.shape):
                raise CheckpointError(
                    f"{holding.name}: {known.dtype} {list(known.shape)} on rank {other}, "
                    f"{holding.dtype} {list(holding.shape)} on rank {rank}"
                )
            for number, region in enumerate(holding.regions):
                ranks = holders.setdefault((holding.name, region), [])
                if not ranks:
                    regions.setdefault(holding.name, []).append(region)
                ranks.append((rank, index, number))
    for name, (_, holding) in first.items():
        if problem := tiling_problem(holding.shape, regions.get(name, [])):
            raise CheckpointError(f"{name}: {problem}; the ranks' tensors do not belong together")
    load = [0] * len(by_rank)
    result: list[list[tuple[int, int]]] = [[] for _ in by_rank]

    def num_bytes(item: tuple[str, Region]) -> int:
        return item[1].volume * DTYPES[first[item[0]][1].dtype].itemsize

    # what only one rank holds comes first, then the large: the rest evens the loads out
    for item in sorted(holders, key=lambda i: (len(holders[i]) > 1, -num_bytes(i))):
        rank, index, number = min(holders[item], key=lambda h: load[h[0]])
        load[rank] += num_bytes(item)
        result[rank].append((index, number))
    return [sorted(items) for items in result]
