"""Sequence numbers of collectives: which rank is where, and who left one out.

Every collective that Python begins in this process is counted where all of them pass, at the
methods of torch's `ProcessGroup`: ours, FSDP2's, the pipeline's sends. Not counted are those that
compiled graphs and DTensor's own redistributions begin in C++. A call costs about a microsecond.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

PAIRWISE = ("send", "recv")  # between two ranks, so that their numbers differ by rank
_METHODS = {
    "allreduce": "all_reduce",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "allreduce_coalesced": "all_reduce",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
}


class Call(NamedTuple):
    """One collective of a group: the how manieth, which, of what."""

    group: tuple[int, ...]  # ranks
    number: int
    operation: str
    shape: tuple[int, ...]
    dtype: str
    name: str = ""  # torch's, of the group: several may have the same ranks

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.group))
        what = f"{self.dtype.removeprefix('torch.')}{list(self.shape)}"
        return f"{self.number}, {self.operation} of {what} over ranks {ranks}"


class Collectives:
    """What this process has begun, newest last, and since when its threads wait."""

    def __init__(self, kept: int = 2000) -> None:
        self.calls: deque[tuple[int, Call]] = deque(maxlen=kept)  # with the thread
        self.waits: dict[int, float] = {}  # since when, by thread
        self.resumed = 0.0  # when this process last ran again after it had been frozen
        self._groups: dict[Any, tuple[tuple[int, ...], str]] = {}
        self._numbers: Counter[tuple[tuple[int, ...], str, str]] = Counter()

    @contextlib.contextmanager
    def watched(self) -> Iterator[Collectives]:
        """Count inside. The methods are torch's own again afterwards."""
        owners: list[tuple[Any, str, Any]] = []

        def replace(owner: Any, name: str, made: Callable[[Any], Any]) -> None:
            owners.append((owner, name, owner.__dict__[name]))
            setattr(owner, name, made(getattr(owner, name)))

        for method, operation in _METHODS.items():
            if method in dist.ProcessGroup.__dict__:
                replace(dist.ProcessGroup, method, functools.partial(self._counted, operation))
        replace(dist.Work, "wait", self._waiting)
        try:
            yield self
        finally:
            for owner, name, original in owners:
                setattr(owner, name, original)

    def waiting(self, thread: int) -> float:
        """For how many seconds ``thread`` has been waiting; 0.0: it is not."""
        since = self.waits.get(thread)
        return 0.0 if since is None else time.monotonic() - max(since, self.resumed)

    def _counted(self, operation: str, original: Any) -> Any:
        # Point-to-point calls of a group count apart: ranks make their own number of them.
        kind = operation if operation in PAIRWISE else ""

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            known = self._groups.get(group)
            if known is None:
                ranks = tuple(dist.get_process_group_ranks(group))
                known = self._groups[group] = ranks, group.group_name
            ranks, name = known
            self._numbers[ranks, name, kind] += 1
            number = self._numbers[ranks, name, kind]
            made = Call(ranks, number, operation, *_described(args), name)
            self.calls.append((threading.get_ident(), made))
            return original(group, *args, **kwargs)

        return call

    def _waiting(self, original: Any) -> Any:
        waits = self.waits

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            me = threading.get_ident()
            waits[me] = time.monotonic()
            try:
                return original(work, *args, **kwargs)
            finally:
                waits.pop(me, None)

        return wait


def _described(args: Sequence[Any]) -> tuple[tuple[int, ...], str]:
    for value in args:
        while isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, Tensor):
            return tuple(value.shape), str(value.dtype)
    return (), ""


def divergence(histories: Mapping[int, Sequence[Call]]) -> tuple[int, str] | None:
    """Which rank left a collective out, and in words what the others do; None: nobody did.

    ``histories``: each rank's newest calls. Ranks of a group must make the same calls in the same
    order; the first number at which they do not is where one went another way. A rank that has
    come less far is it; else the one whose call does not follow as it followed before (steps are
    alike); else the one in the minority.
    """
    groups = {(call.group, call.name) for calls in histories.values() for call in calls}
    for group, name in sorted(groups, key=lambda g: (-len(g[0]), g)):
        by_rank = {
            rank: {
                c.number: c
                for c in calls
                if (c.group, c.name) == (group, name) and c.operation not in PAIRWISE
            }
            for rank, calls in histories.items()
            if rank in group
        }
        if len(by_rank) < 2 or not all(by_rank.values()):
            continue
        first = max(min(calls) for calls in by_rank.values())
        last = max(max(calls) for calls in by_rank.values())
        for number in range(first, last + 1):
            there = {rank: calls.get(number) for rank, calls in by_rank.items()}
            if len({_kind(call) for call in there.values()}) > 1:
                before = [_kind(by_rank[group[0]][n]) for n in range(first, number)]
                return _blamed(there, _followed(before), number)
    return None


Kind = tuple[Any, ...]


def _kind(call: Call | None) -> Kind | None:
    return None if call is None else (call.operation, call.shape, call.dtype)


def _followed(before: Sequence[Kind | None]) -> Kind | None:
    """What came next the last time that the longest context like the newest stood there."""
    for length in range(min(16, len(before) - 1), 0, -1):
        context = before[len(before) - length :]
        for end in range(len(before) - 1, length - 1, -1):
            if before[end - length : end] == context:
                return before[end]
    return None


def _blamed(there: Mapping[int, Call | None], usual: Kind | None, number: int) -> tuple[int, str]:
    kinds = {rank: _kind(call) for rank, call in there.items()}
    count = Counter(kinds.values())
    strays = usual in count

    def suspicion(rank: int) -> tuple[bool, bool, int, int]:
        kind = kinds[rank]
        return kind is None, strays and kind != usual, -count[kind], rank

    rank = max(there, key=suspicion)
    others = [r for r in there if kinds[r] != kinds[rank]]
    expected = next(call for r in others if (call := there[r]) is not None)
    mine = there[rank]
    where = f"went on to {mine}" if mine else f"stands after collective {number - 1} of them"
    return rank, (
        f"rank {rank} left a collective out: {_ranks(others)} in collective {expected}, "
        f"rank {rank} {where}"
    )


def _ranks(ranks: Sequence[int]) -> str:
    several = len(ranks) > 1
    return f"rank{'s' if several else ''} {', '.join(map(str, ranks))} wait{'' if several else 's'}"
