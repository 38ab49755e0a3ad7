"""States of optimizers beside parameters that ranks hold in parts, and sums over those ranks.

A state is a tensor of a global shape of its own, a DTensor where its parameter is one: checkpoint,
resharding and verify then know which of it a rank holds, and need no word on any kind.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from shardwise.ops import comm
from shardwise.ops.local_shards import local_shards
from shardwise.parallel.full_tensor import local_tensor as local_tensor


def zeros(param: Tensor, reduced: Collection[int] = (), dtype: torch.dtype | None = None) -> Tensor:
    """A state of the parameter's shape, cut as it is, and of size 1 along ``reduced`` dimensions.

    Of those every rank holds all.
    """
    own = local_tensor(param.detach())
    shape, part = ([1 if d in reduced else n for d, n in enumerate(t.shape)] for t in (param, own))
    value = torch.zeros(part, dtype=dtype or own.dtype, device=own.device)
    if not isinstance(param, DTensor):
        return value
    placements = [
        Replicate() if getattr(p, "dim", None) in reduced else p for p in param.placements
    ]
    return _on_mesh(value, param, placements, shape)


def vector(param: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """A state of ``length`` numbers, of which every rank holds all; zeros."""
    value = torch.zeros(length, dtype=dtype, device=local_tensor(param.detach()).device)
    if not isinstance(param, DTensor):
        return value
    return _on_mesh(value, param, [Replicate()] * param.device_mesh.ndim, [length])


def _on_mesh(value: Tensor, like: DTensor, placements: list, shape: list[int]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        value, like.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def holders(param: Tensor, dim: int | None = None) -> list[tuple[dist.ProcessGroup, str]]:
    """The groups over which a parameter is cut (along ``dim``), and the names of their axes."""
    if not isinstance(param, DTensor):
        return []
    mesh, names = param.device_mesh, param.device_mesh.mesh_dim_names or ()
    return [
        (mesh.get_group(axis), names[axis] if names else "shard")
        for axis, placement in enumerate(param.placements)
        if not placement.is_replicate() and dim in (None, placement.dim)  # type: ignore[attr-defined]
    ]


def total(values: Tensor, param: Tensor, dim: int | None = None) -> Tensor:
    """Sums over what each rank holds (along ``dim``) to sums over the whole; in place."""
    for group, axis in holders(param, dim):
        comm.all_reduce(values, group, axis)
    return values


def maximum(values: Tensor, param: Tensor) -> Tensor:
    """`total`, for maxima."""
    for group, axis in holders(param):
        comm.all_max(values, group, axis)
    return values


def keep_own(part: Tensor, whole: Tensor) -> None:
    """Write a global tensor, or this rank's regions of it, into ``part``."""
    for region, view in local_shards("a state", part):
        view.copy_(whole[region.relative_to((0,) * whole.dim())])


def flat_index(param: Tensor) -> Tensor:
    """int64, in the shape of this rank's part: where in the flattened global tensor each is."""
    own = local_tensor(param.detach())
    index = torch.empty(own.shape, dtype=torch.int64, device=own.device)
    if not isinstance(param, DTensor):
        return torch.arange(own.numel(), device=own.device).view(own.shape)
    strides = torch.empty(param.shape, device="meta").stride()
    places = DTensor.from_local(
        index,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    for region, view in local_shards("an index", places):
        view.zero_()
        for dim, (first, size, stride) in enumerate(
            zip(region.offset, region.shape, strides, strict=True)
        ):
            along = torch.arange(first, first + size, device=own.device) * stride
            view += along.view([-1 if d == dim else 1 for d in range(view.dim())])
    return index
