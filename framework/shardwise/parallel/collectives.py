"""Collectives with the reductions that the engine relies on, for gloo and NCCL alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter


def sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``values`` over ``group`` in place; without a group of several ranks, unchanged."""
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group)
    return values


class _Allocate:
    """Buffers from the ordinary allocator."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(tuple(size), dtype=dtype, device=device)


class AllToAllReduceScatter(_Allocate, ReduceScatter):  # type: ignore[misc]
    """Reduce-scatter as an all-to-all and a local sum in rank order.

    gloo's reduce_scatter takes five times as long as its all_to_all, and its order of summation
    depends on the ring; here the order is fixed.
    """

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM, "gradients are sums over data ranks"
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor.view(-1))


class AllToAllGather(_Allocate, AllGather):  # type: ignore[misc]
    """All-gather as an all-to-all of repeated shards: gloo's faster primitive."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        world = group.size()
        # The input may be a view of the output, hence the copy that repeat makes.
        repeated = input_tensor.view(1, -1).expand(world, -1).reshape(-1)
        work = dist.all_to_all_single(output_tensor, repeated, group=group, async_op=async_op)
        if async_op:
            return _Keep(work, repeated)  # type: ignore[return-value]
        return None


class _Keep:
    """A work handle that keeps its send buffer alive until it is waited for."""

    def __init__(self, work: dist.Work, *buffers: Tensor) -> None:
        self.work, self.buffers = work, buffers

    def wait(self, *args: object) -> bool:
        done = bool(self.work.wait())
        self.buffers = ()
        return done
