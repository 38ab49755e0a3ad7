"""Whole tensors from the parts that tensor parallelism and ZeRO left, uneven ones included."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwise.ops import comm
from shardwise.ops.flat_shard import FlatShard
from shardwise.ops.region_shards import RegionShards
from shardwise.parallel.mesh import Mesh


def local_tensor(tensor: Tensor | None) -> Tensor:
    """This rank's memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, (DTensor, FlatShard, RegionShards)) else tensor


def tp_dim(tensor: Tensor, mesh: Mesh) -> int | None:
    """Along which dimension tp ranks cut a tensor; None if each holds all of it."""
    if mesh.layout.tp == 1 or not isinstance(tensor, DTensor):
        return None
    placement = tensor.placements[-1]
    return None if placement.is_replicate() else int(placement.dim)  # type: ignore[attr-defined]


@torch.no_grad()
def full_tensor(tensor: Tensor, mesh: Mesh) -> Tensor:
    """The global tensor, on every rank of this pipeline stage; a collective call.

    Tensor parallelism cuts first, as torch.chunk does, then ZeRO cuts each part along its first
    dimension; DTensor's own gathering does not undo that order for uneven parts.
    """
    if isinstance(tensor, RegionShards):
        return _filled(tensor, mesh)
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    value, shape = tensor.to_local().detach(), list(tensor.shape)
    cut = tp_dim(tensor, mesh)
    part = list(shape)
    if cut is not None:
        part[cut] = chunk_size(shape[cut], mesh.layout.tp, mesh.place["tp"])
    if part:
        value = join(value, part[0], 0, mesh.groups["shard"])
    if cut is not None:
        value = join(value, shape[cut], cut, mesh.groups["tp"])
    return value


def _filled(shards: RegionShards, mesh: Mesh) -> Tensor:
    """Of what ranks have in regions, no element twice among those that share it."""
    whole = torch.zeros(shards.shape, dtype=shards.dtype, device=shards.device)
    for region, view in shards.parts:
        whole[region.relative_to((0,) * whole.dim())] = view.detach()
    for axis in ("shard", "tp"):
        if mesh.groups[axis].size() > 1 and (axis == "shard" or shards.cut is not None):
            # Bytes of which all ranks but one have zeros: their sum is exact.
            dist.all_reduce(whole.view(torch.uint8), group=mesh.groups[axis])
    return whole


def chunk_size(total: int, parts: int, index: int) -> int:
    """The size of part ``index`` as torch.chunk cuts."""
    each = -(-total // parts)
    return max(0, min(each, total - index * each))


def join(value: Tensor, total: int, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The parts that a group's ranks hold of a dimension of ``total``, cut as torch.chunk cuts."""
    world = group.size()
    if world == 1:
        return value
    each = -(-total // world)
    value = value.transpose(0, dim)
    padding = [0, 0] * (value.dim() - 1) + [0, each - value.shape[0]]
    value = F.pad(value, padding).contiguous()
    out = value.new_empty((world * each, *value.shape[1:]))
    comm.all_gather(out, value, group, "gather").wait()
    return out[:total].transpose(0, dim).contiguous()
