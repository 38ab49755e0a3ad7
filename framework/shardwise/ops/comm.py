"""Every collective that shardwise makes itself, counted by mesh axis.

Counts are *logical*: an all-gather is an all-gather of its result's bytes, whatever a backend makes
of it (gloo's all-gather and reduce-scatter are slower than its all-to-all, so on CPU they are made
of that). `tally` collects what happens inside it; published communication volumes are compared
with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(eq=False)  # two that counted the same, one inside the other, are two
class Tally:
    """Calls, bytes and dtypes by (axis, operation), on this rank.

    Bytes: the result of an all-gather, the input of a reduce-scatter, all-to-all or all-reduce,
    the message of a send.
    """

    calls: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    dtypes: dict[tuple[str, str], set[torch.dtype]] = dataclasses.field(default_factory=dict)
    last: dict[str, str] = dataclasses.field(default_factory=dict)  # by operation, and "" of all

    def add(self, axis: str, operation: str, tensor: Tensor, times: int = 1) -> None:
        """One call that moves ``tensor`` (``times`` over)."""
        self.calls[axis, operation] += 1
        self.dtypes.setdefault((axis, operation), set()).add(tensor.dtype)
        self.last[operation] = self.last[""] = f"{operation} over {axis}"
        self.bytes[axis, operation] += tensor.numel() * tensor.element_size() * times

    def rows(self) -> list[dict[str, Any]]:
        """Plain rows, sorted: axis, operation, calls, bytes."""
        return [
            {"axis": a, "operation": o, "calls": n, "bytes": self.bytes[a, o]}
            for (a, o), n in sorted(self.calls.items())
        ]


_TALLIES: list[Tally] = []


@contextlib.contextmanager
def tally() -> Iterator[Tally]:
    """Count everything that happens inside."""
    mine = Tally()
    _TALLIES.append(mine)
    try:
        yield mine
    finally:
        _TALLIES.remove(mine)


def count(axis: str, operation: str, tensor: Tensor, times: int = 1) -> None:
    """Tell whoever listens of one collective."""
    for listener in _TALLIES:
        listener.add(axis, operation, tensor, times)


class Pending:
    """A result on its way. `wait` returns it; buffers stay alive until then."""

    def __init__(self, works: Sequence[Any], result: Any, *buffers: Tensor) -> None:
        self.works, self.result, self.buffers = works, result, buffers

    def wait(self) -> Any:
        """Block (or make the stream wait) until the result is there."""
        for work in self.works:
            if work is not None:
                work.wait()
        self.works, self.buffers = (), ()
        return self.result


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, axis: str) -> Tensor:
    """Sum in place; 16-bit floats are summed in fp32, and rounded once."""
    if group is None or group.size() == 1:
        return tensor
    return begin_all_reduce(tensor, group, axis, async_op=False).wait()  # type: ignore[no-any-return]


def begin_all_reduce(
    tensor: Tensor, group: dist.ProcessGroup, axis: str, async_op: bool = True
) -> Pending:
    """`all_reduce`, without waiting."""
    count(axis, "all_reduce", tensor)
    wide = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    work = dist.all_reduce(wide, group=group, async_op=async_op)
    return _Rounded([work], tensor, wide)


class _Rounded(Pending):
    def wait(self) -> Any:
        wide = self.buffers[0] if self.buffers else None
        out = super().wait()
        return out if wide is None or wide is out else out.copy_(wide)


def all_max(tensor: Tensor, group: dist.ProcessGroup, axis: str) -> Tensor:
    """Elementwise maximum in place."""
    if group.size() == 1:
        return tensor
    count(axis, "all_reduce", tensor)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def all_to_all(
    out: Tensor, inp: Tensor, group: dist.ProcessGroup, axis: str, async_op: bool = False
) -> Pending:
    """Equal slices of the first dimension: slice i goes to rank i."""
    count(axis, "all_to_all", inp)
    inp = inp.contiguous()
    work = dist.all_to_all_single(out, inp, group=group, async_op=async_op)
    return Pending([work], out, inp)


def all_gather(
    out: Tensor, inp: Tensor, group: dist.ProcessGroup, axis: str, async_op: bool = False
) -> Pending:
    """Every rank's ``inp``, one after another along the first dimension of ``out``."""
    count(axis, "all_gather", out)
    return _all_gather(out, inp, group, async_op)


def _all_gather(out: Tensor, inp: Tensor, group: dist.ProcessGroup, async_op: bool) -> Pending:
    world = group.size()
    if not inp.is_cpu:
        inp = inp.contiguous()
        work = dist.all_gather_into_tensor(out, inp, group=group, async_op=async_op)
        return Pending([work], out, inp)
    # gloo's faster primitive. The input may be a view of the output, hence the copy.
    repeated = inp.reshape(-1).repeat(world)
    work = dist.all_to_all_single(out.view(-1), repeated, group=group, async_op=async_op)
    return Pending([work], out, repeated)


def reduce_scatter(
    out: Tensor, inp: Tensor, group: dist.ProcessGroup, axis: str, async_op: bool = False
) -> Pending:
    """Sum of every rank's slice of the first dimension of ``inp`` that belongs to this rank.

    On CPU the slices are summed here in rank order, in fp32 at least: the order is fixed, and
    16-bit inputs are rounded once.
    """
    count(axis, "reduce_scatter", inp)
    inp = inp.contiguous()
    if not inp.is_cpu:
        work = dist.reduce_scatter_tensor(out, inp, group=group, async_op=async_op)
        return Pending([work], out, inp)
    received = torch.empty_like(inp)
    work = dist.all_to_all_single(received, inp, group=group, async_op=async_op)
    return _Summed([work], out, inp, received, world=group.size())


class _Summed(Pending):
    def __init__(self, works: Sequence[Any], out: Tensor, *buffers: Tensor, world: int) -> None:
        super().__init__(works, out, *buffers)
        self.world = world

    def wait(self) -> Any:
        received = self.buffers[1] if self.buffers else None
        out = super().wait()
        if received is not None:
            parts = received.view(self.world, -1)
            wide = torch.float64 if out.dtype == torch.float64 else torch.float32
            if out.dtype == wide:
                torch.sum(parts, dim=0, out=out.view(-1))
            else:
                out.view(-1).copy_(parts.sum(0, dtype=wide))
        return out


def send(tensor: Tensor, to: int, group: dist.ProcessGroup, axis: str, tag: int = 0) -> Pending:
    """Send to the group's rank ``to``, without waiting."""
    count(axis, "send", tensor)
    tensor = tensor.contiguous()
    return Pending([dist.isend(tensor, group_dst=to, group=group, tag=tag)], tensor, tensor)


def receive(out: Tensor, source: int, group: dist.ProcessGroup, tag: int = 0) -> Pending:
    """Receive from the group's rank ``source`` into ``out``, without waiting."""
    return Pending([dist.irecv(out, group_src=source, group=group, tag=tag)], out)


def ring_shift(tensors: Sequence[Tensor], group: dist.ProcessGroup, axis: str) -> Pending:
    """Send to the next rank of the group, receive the like from the previous one."""
    world, rank = group.size(), group.rank()
    sent = [t.contiguous() for t in tensors]
    received = [torch.empty_like(t) for t in sent]
    following, previous = (rank + 1) % world, (rank - 1) % world
    ops = []
    for out, inp in zip(received, sent, strict=True):
        count(axis, "send", inp)
        ops.append(dist.P2POp(dist.isend, inp, group=group, group_peer=following))
        ops.append(dist.P2POp(dist.irecv, out, group=group, group_peer=previous))
    return Pending(dist.batch_isend_irecv(ops), received, *sent)
