"""Which regions of a global tensor this rank holds: plain ones, flat parts, DTensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwise.errors import CheckpointError
from shardwise.ops.flat_shard import FlatShard, flat_regions
from shardwise.ops.region_shards import RegionShards
from shardwise.ops.regions import Interval, Region, full_region, product, strided_chunk


class LocalShard(NamedTuple):
    """A region of the global tensor and the view of this rank's memory that holds it."""

    region: Region
    view: Tensor


def local_shards(name: str, tensor: Tensor) -> list[LocalShard]:
    """The parts of ``tensor`` in this rank's memory; views, so writing into them fills it.

    Raises CheckpointError for tensors that are not a set of regions (sparse, quantised, pending
    reductions) or have no memory (meta device).
    """
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{name}: only dense tensors can be saved, not {tensor.layout}")
    if tensor.device.type == "meta":
        raise CheckpointError(f"{name}: is on the meta device, it has no values")
    if isinstance(tensor, FlatShard):
        flat, start = tensor.local.detach(), tensor.start
        found = flat_regions(tensor.shape, start, start + len(flat))
        return [
            LocalShard(r, flat[at - start : at - start + r.volume].view(r.shape)) for r, at in found
        ]
    if isinstance(tensor, RegionShards):
        return [LocalShard(region, view.detach()) for region, view in tensor.parts]
    if not isinstance(tensor, DTensor):
        region = full_region(tensor.shape)
        return [LocalShard(region, tensor.detach())] if region.volume else []
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is outside of the tensor's mesh
        return []
    with (
        torch.no_grad()
    ):  # with gradients, this would be DTensor's work of a tenth of a millisecond
        local = tensor.to_local().detach()
    try:
        held, parts = _parts(tensor.shape, mesh.shape, tuple(coordinate), tensor.placements)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    if held != local.shape:
        raise CheckpointError(
            f"{name}: placements {tensor.placements} over a mesh of {list(mesh.shape)} give a "
            f"local shape of {list(held)} at {list(coordinate)}, but the local tensor is "
            f"{list(local.shape)}"
        )
    return [LocalShard(region, local[inner]) for region, inner in parts]


@functools.lru_cache(maxsize=1 << 14)
def _parts(
    shape: torch.Size,
    mesh_sizes: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
) -> tuple[tuple[int, ...], tuple[tuple[Region, tuple[slice, ...]], ...]]:
    """The local shape, and each region with its place in the local tensor."""
    positions = local_positions(shape, mesh_sizes, coordinate, placements)
    held = tuple(sum(end - start for start, end in dim) for dim in positions)
    origin = (0,) * len(held)
    found = product(positions)
    return held, tuple((region, inner.relative_to(origin)) for region, inner in found)


def local_positions(
    shape: Sequence[int],
    mesh_sizes: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Any],
) -> list[list[Interval]]:
    """For each tensor dimension, the global positions that a mesh coordinate holds, in order.

    ``_StridedShard`` says that mesh axes further right cut the dimension first (FSDP2 over tensor
    parallel); replaying the cuts in that order is exact for uneven sizes too, where reading the
    placements from left to right would not be.
    """
    positions: list[list[Interval]] = [[(0, n)] if n else [] for n in shape]
    for dim in range(len(shape)):
        axes = [a for a, p in enumerate(placements) if getattr(p, "dim", None) == dim]
        order = _cutting_order(axes, mesh_sizes, placements)
        for axis in order if order is not None else axes:
            count, index = mesh_sizes[axis], coordinate[axis]
            factor = 1 if order is not None else int(getattr(placements[axis], "split_factor", 1))
            positions[dim] = strided_chunk(positions[dim], count, index, factor)
    for placement in placements:
        if placement.is_partial():
            raise ValueError("holds a pending reduction (Partial); reduce it before saving")
    return positions


def _cutting_order(
    axes: Sequence[int], mesh_sizes: Sequence[int], placements: Sequence[Any]
) -> list[int] | None:
    """Mesh axes in the order in which they cut a dimension; None if no order explains them."""
    order: list[int] = []
    for axis in reversed(axes):
        factor = int(getattr(placements[axis], "split_factor", 1))
        cuts = [math.prod(mesh_sizes[a] for a in order[:n]) for n in range(len(order) + 1)]
        if factor not in cuts:
            return None
        order.insert(cuts.index(factor), axis)
    return order
