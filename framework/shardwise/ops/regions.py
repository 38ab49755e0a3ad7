"""Arithmetic of axis-aligned regions: which part of a global tensor somebody holds.

A region is an offset and a shape, both in elements, one entry a tensor dimension. Scalars have
zero dimensions and volume one. Everything here is a pure function of integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

Interval = tuple[int, int]  # half open: start, end


class Region(NamedTuple):
    """The region ``offset[d] <= index[d] < offset[d] + shape[d]`` of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def relative_to(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        """Index this region in a tensor whose first element lies at ``origin``."""
        return tuple(
            slice(o - b, o - b + s) for o, s, b in zip(self.offset, self.shape, origin, strict=True)
        )


def full_region(shape: Sequence[int]) -> Region:
    """The region of an entire tensor."""
    return Region((0,) * len(shape), tuple(shape))


def overlap(a: Region, b: Region) -> Region | None:
    """The common region of two regions of the same tensor, or None if it is empty."""
    offset = tuple(map(max, a.offset, b.offset))
    end = (min(ao + n, bo + m) for ao, n, bo, m in zip(a.offset, a.shape, b.offset, b.shape))
    shape = tuple(e - o for e, o in zip(end, offset))
    return None if any(n <= 0 for n in shape) else Region(offset, shape)


def contains(outer: Region, inner: Region) -> bool:
    """Whether no element of ``inner`` lies outside of ``outer``."""
    return len(outer.shape) == len(inner.shape) and all(
        o <= i and i + m <= o + n
        for o, n, i, m in zip(outer.offset, outer.shape, inner.offset, inner.shape)
    )


def first_clash(regions: Sequence[Region]) -> tuple[Region, Region] | None:
    """Two regions that share an element, or None; a sweep along the dimension with most cuts."""
    if len(regions) < 2:
        return None
    num_dims = len(regions[0].shape)
    if num_dims == 0:
        return regions[0], regions[1]
    dim = max(range(num_dims), key=lambda d: len({b.offset[d] for b in regions}))
    active: list[Region] = []
    for region in sorted(regions, key=lambda b: b.offset[dim]):
        active = [a for a in active if a.offset[dim] + a.shape[dim] > region.offset[dim]]
        for other in active:
            if overlap(other, region):
                return other, region
        active.append(region)
    return None


def tiling_problem(shape: Sequence[int], regions: Sequence[Region]) -> str | None:
    """Why ``regions`` do not tile a tensor of ``shape`` exactly once; None if they do."""
    everything = full_region(shape)
    for region in regions:
        if not contains(everything, region):
            return f"the chunk at {list(region.offset)} of shape {list(region.shape)} sticks out"
    if clash := first_clash(regions):
        a, b = clash
        return (
            f"the chunks at {list(a.offset)} of shape {list(a.shape)} and at {list(b.offset)} "
            f"of shape {list(b.shape)} overlap"
        )
    missing = everything.volume - sum(b.volume for b in regions)
    return f"{missing} of {everything.volume} elements are held by nobody" if missing else None


def chunk(intervals: Sequence[Interval], count: int, index: int) -> list[Interval]:
    """Part ``index`` of ``count`` of a set of positions, split as ``torch.chunk`` splits.

    The positions are those of ``intervals``, in order; every part has the size of the first but
    the last ones, which may be short or empty.
    """
    total = sum(end - start for start, end in intervals)
    size = -(-total // count)
    low, high = min(size * index, total), min(size * (index + 1), total)
    part: list[Interval] = []
    position = 0
    for start, end in intervals:
        first = max(low - position, 0)
        last = min(high - position, end - start)
        if first < last:
            part.append((start + first, start + last))
        position += end - start
    return part


def strided_chunk(
    intervals: Sequence[Interval], count: int, index: int, split_factor: int
) -> list[Interval]:
    """Part ``index`` of ``count`` of each of ``split_factor`` parts: DTensor's _StridedShard."""
    parts: list[Interval] = []
    for part in range(split_factor):
        for start, end in chunk(chunk(intervals, split_factor, part), count, index):
            if parts and parts[-1][1] == start:
                parts[-1] = (parts[-1][0], end)
            else:
                parts.append((start, end))
    return parts


def product(intervals_by_dim: Sequence[Sequence[Interval]]) -> list[tuple[Region, Region]]:
    """Regions of a cartesian product of positions, each as (global, in the local tensor).

    The local tensor holds the positions of every dimension one after the other.
    """
    sides: list[list[tuple[int, int, int]]] = []  # global start, local start, length
    for intervals in intervals_by_dim:
        local = 0
        side = []
        for start, end in intervals:
            side.append((start, local, end - start))
            local += end - start
        sides.append(side)
    return [
        (
            Region(tuple(s[0] for s in combination), tuple(s[2] for s in combination)),
            Region(tuple(s[1] for s in combination), tuple(s[2] for s in combination)),
        )
        for combination in itertools.product(*sides)
    ]
