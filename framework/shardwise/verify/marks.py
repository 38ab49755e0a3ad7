"""Values to put into tensors, so that it shows whether and where they arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from shardwise.ops.local_shards import local_shards

ROUNDINGS = 16.0


def ramp(like: Tensor) -> Tensor:
    """From 0 to 1, another number an element: what is put in another place shows."""
    count = like.numel()
    return torch.arange(count, dtype=like.dtype, device=like.device).div_(count).view(like.shape)


def fill(name: str, tensor: Tensor, value: float, *, last: bool) -> None:
    """Set the first or last element of a whole tensor, on the ranks that have it."""
    for region, view in local_shards(name, tensor):
        ends = zip(*region, tensor.shape, strict=True)
        if last and all(o + n == m for o, n, m in ends):
            view.reshape(-1)[-1:].fill_(value)
        elif not last and not any(region.offset):
            view.reshape(-1)[:1].fill_(value)


def is_back(before: Tensor, after: Tensor) -> bool:
    """Whether a tensor is as it was, but for a rounding on the way to where gradients are taken."""
    if not before.is_floating_point() or torch.equal(before, after):
        return torch.equal(before, after)
    room = ROUNDINGS * torch.finfo(before.dtype).eps * before.abs().max()
    return bool((after - before).abs().max() <= room)
