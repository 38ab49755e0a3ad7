"""A rank's part of a tensor that is a stretch of its elements in row-major order.

So does a library cut that flattens parameters before it deals them out (DeepSpeed's ZeRO, where a
part may begin and end within a row). To whoever asks for its shape, dtype or device it is the
global tensor; `local_shards` tells which regions of it are here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.ops.regions import Region


class FlatShard(Tensor):
    """Elements ``start`` to ``start + len(local)`` of a tensor of ``shape``.

    ``local``: this rank's memory [n], live. Of operations it knows `detach`, `clone`, `copy_` and
    nothing else: there is no arithmetic on a part. Raises ValueError for a stretch beyond the end.
    """

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int], start: int) -> FlatShard:
        """See the class."""
        if local.dim() != 1 or start < 0 or start + len(local) > math.prod(shape):
            raise ValueError(
                f"elements {start} to {start + local.numel()} of a tensor of {list(shape)}"
            )
        self: FlatShard = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tuple(shape), dtype=local.dtype, device=local.device
        )
        self.local, self.start = local, start
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Which part of what."""
        end = self.start + len(self.local)
        return f"FlatShard({self.start} to {end} of {list(self.shape)}, {self.dtype})"

    def to_local(self) -> Tensor:
        """This rank's memory [n]."""
        return self.local

    def detach(self) -> FlatShard:
        """The same memory; below the dispatcher its counter of writes would be another."""
        return FlatShard(self.local.detach(), self.shape, self.start)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """`detach`, `clone` and `copy_`."""
        shard = args[0]
        if func is torch.ops.aten.copy_.default and isinstance(args[1], cls):
            shard.local.copy_(args[1].local)
            return shard
        if func not in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            raise NotImplementedError(f"{func} of a FlatShard: gather it, or use `to_local`")
        return cls(func(shard.local), shard.shape, shard.start)


def flat_regions(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Region, int]]:
    """The rectangles that tile elements ``start`` to ``stop``, each with its first element.

    At most two a dimension and one: what is left of the first row, whole rows, the last row.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield Region((start,) * len(shape), (stop - start,) * len(shape)), start
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield Region((first, *zeros), (last - first, *shape[1:])), first * row
    yield from _in_row(shape, last, last * row, stop)


def _in_row(
    shape: Sequence[int], index: int, start: int, stop: int
) -> Iterator[tuple[Region, int]]:
    """The same of elements that lie in one row."""
    before = index * math.prod(shape[1:])
    for (offset, size), at in flat_regions(shape[1:], start - before, stop - before):
        yield Region((index, *offset), (1, *size)), before + at
