"""Collectives with the reductions that the engine relies on, for gloo and NCCL alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from shardwise.ops import comm


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


class CountedReduceScatter(_Allocate, ReduceScatter):  # type: ignore[misc]
    """FSDP2's reduction of gradients; on CPU in rank order, see `ops.comm.reduce_scatter`."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM, "gradients are sums over data ranks"
        comm.reduce_scatter(output_tensor, input_tensor, group, "shard").wait()


class CountedAllGather(_Allocate, AllGather):  # type: ignore[misc]
    """FSDP2's gathering of weights."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        assert not async_op, "FSDP2 gathers so only where it is asked to"
        comm.all_gather(output_tensor, input_tensor, group, "shard").wait()


def _device(group: dist.ProcessGroup) -> str:
    """Where the group's backend takes tensors from."""
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def sum_parts(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Numbers of which each comes from one rank, and is 0 on the others: the sum is a copy."""
    if group is None or group.size() == 1:
        return values
    return sum_over(values.to(_device(group)), group).cpu()


def broadcast_bytes(data: bytes | None, source: int, group: dist.ProcessGroup) -> bytes:
    """Bytes of the group's rank ``source`` to all of it."""
    device = _device(group)
    size = torch.tensor([len(data or b"")], dtype=torch.int64, device=device)
    dist.broadcast(size, group_src=source, group=group)
    buffer = torch.empty(int(size), dtype=torch.uint8, device=device)
    if data:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if int(size):
        dist.broadcast(buffer, group_src=source, group=group)
    return buffer.cpu().numpy().tobytes()


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's value (plain JSON), by rank of the group; exact for floats."""
    if group.size() == 1:
        return [json.loads(json.dumps(value))]
    said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    device = _device(group)
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=device)
    comm.all_gather(sizes, torch.tensor([len(said)], device=device), group, "world").wait()
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(said)] = said
    whole = torch.empty(group.size() * longest, dtype=torch.uint8, device=device)
    comm.all_gather(whole, padded, group, "world").wait()
    parts = whole.view(group.size(), longest).cpu().numpy()
    return [json.loads(part[:n].tobytes()) for part, n in zip(parts, sizes.tolist(), strict=True)]


def all_to_all_parts(
    parts: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup, axis: str
) -> list[Tensor]:
    """What every rank of the group has for this one; ``parts[r]`` (1-D, of one dtype) goes to r.

    ``sizes[r]``: how much rank r sends here.
    """
    device = _device(group)
    sent = torch.cat(list(parts)).to(device)
    received = torch.empty(sum(sizes), dtype=sent.dtype, device=device)
    comm.count(axis, "all_to_all", sent)
    dist.all_to_all_single(received, sent, list(sizes), list(map(len, parts)), group=group)
    return list(received.cpu().split(list(sizes)))
