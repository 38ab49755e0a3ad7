"""A persistent pool of rank processes, so that a multi-rank computation costs milliseconds.

Ranks are forked from a server process that has already imported torch (`server`). The caller hands
the pool a module-level function; every rank of the world calls it with the same arguments, and its
return values come back as a list by rank. An exception on any rank fails the call with the rank,
the place and the traceback, and the pool of that size is started afresh. Worlds are kept, and may
be started ahead of their first call.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from shardwise.errors import UserError
from shardwise.verify import server
from shardwise.verify.rank import ByValue, Failure, import_main, is_ours, place, stack_file

__all__ = ["RankError", "RankHang", "RankPool", "room"]

# What a rank of a small model has for itself: docs/results/verify.md has the measurement.
RANK_BYTES = 96 << 20
# How long the others may take to say what they met, after the first error: something of their own,
# or only that a peer is gone.
_GRACE_S = 0.3
_GRACE_OF_CONSEQUENCES_S = 3.0
_CONSEQUENCE = re.compile(
    r"(?i)connection (closed|reset|refused)|broken pipe|timed out|socket timeout|read: EOF"
)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


class RankError(Exception):
    """A rank raised, or died. The first line of the text is a sentence, the rest the traceback.

    Attributes:
        rank: who, of several ranks the one that was first.
        cause: the type of the exception, ``ProcessDied`` where there was none.
        message: what it says.
        where: ``file:line in function``, innermost in the package or a user's code.
        others: the sentences of further ranks, by rank.
    """

    def __init__(self, rank: int, failure: Failure, others: dict[int, str] | None = None) -> None:
        self.rank, self.cause, self.message = rank, failure.cause, failure.message
        self.where, self.others = failure.where, others or {}
        parts = [_sentence(rank, failure), failure.text, *self.others.values()]
        super().__init__("\n".join(p for p in parts if p))


class RankHang(TimeoutError):  # noqa: N818
    """Ranks did not answer in time. The text's first line says which, and where each stands."""


def _sentence(rank: int, failure: Failure) -> str:
    if failure.cause == "ProcessDied":
        return f"rank {rank} died: {failure.message}"
    at = f" at {failure.where}" if failure.where else ""
    at += f", called at {failure.caller}" if failure.caller else ""
    first = next(iter(failure.message.strip().splitlines()), "")
    return f"rank {rank} raised {failure.cause}{at}: {first}"


class _World:
    """``size`` rank processes with one process group."""

    def __init__(self, size: int, backend: str) -> None:
        self.server = server.start()
        self.folder = tempfile.TemporaryDirectory(prefix="shardwise-pool-")
        self.pipes: list[Connection] = []
        self.pids: list[int] = []
        self.knows_main = False
        try:
            for rank in range(size):
                ours, theirs = Pipe()
                self.pipes.append(ours)
                with theirs:
                    self.pids.append(
                        self.server.fork(rank, size, self.folder.name, backend, theirs)
                    )
        except BaseException:
            self.stop()
            raise

    def run(self, fn: Callable[..., Any], args: Any, kwargs: Any, timeout: float) -> list[Any]:
        if fn.__module__ == "__main__" and not self.knows_main:
            self.knows_main = True
            self.run(
                import_main, (getattr(sys.modules["__main__"], "__file__", None),), {}, timeout
            )
        call = bytes(ByValue.dumps((str(Path.cwd()), fn, args, kwargs)))
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):  # it has died, as its end of the pipe tells
                pipe.send_bytes(call)
        answers: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        rank_of = {id(pipe): rank for rank, pipe in enumerate(self.pipes)}
        pending: list[Any] = list(self.pipes)
        deadline = None
        while pending:
            left = timeout if deadline is None else max(0.0, deadline - time.monotonic())
            ready = wait(pending, left)
            if not ready:
                break
            for pipe in ready:  # type: ignore[assignment]
                pending.remove(pipe)
                rank = rank_of[id(pipe)]
                answer = self._answer(rank)
                if isinstance(answer, Failure):
                    failures[rank] = answer
                else:
                    answers[rank] = answer
            if failures:
                only = all(map(_is_consequence, failures.values()))
                grace = _GRACE_OF_CONSEQUENCES_S if only else _GRACE_S
                deadline = min(f.seconds for f in failures.values()) + grace
        if failures:
            raise _error_of(failures)
        if pending:
            raise RankHang(self._hang(sorted(rank_of[id(p)] for p in pending), timeout))
        return [answers[r] for r in range(len(self.pipes))]

    def _answer(self, rank: int) -> Any:
        try:
            return self.pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            code = self.server.ended(self.pids[rank])
            how = "it is gone" if code is None else f"exit code {code}"
            if code is not None and code < 0:
                with contextlib.suppress(ValueError):
                    how = f"killed by {signal.Signals(-code).name}"
            if code is not None:
                self.pids[rank] = 0
            return Failure("ProcessDied", how, "", "", time.monotonic(), "")

    def _hang(self, ranks: list[int], timeout: float) -> str:
        """Which ranks did not answer, grouped by where they stand, and their stacks."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGXCPU)
        stacks = {rank: self._stack(rank) for rank in ranks}
        standing: dict[str, list[int]] = {}
        for rank, stack in stacks.items():
            frames = [(f, int(n), fn) for f, n, fn in _FRAME.findall(stack)]
            ours = [x for x in frames if is_ours(x[0])] or frames
            standing.setdefault(place(*ours[0]) if ours else "no Python frame", []).append(rank)
        told = "; ".join(f"{named(r)} at {where}" for where, r in standing.items())
        lines = [f"no answer in {timeout:g} s: {told}"]
        for [first, *_] in standing.values():  # one of each
            lines += [f"rank {first}:", stacks[first].rstrip()]
        return "\n".join(lines)

    def _stack(self, rank: int) -> str:
        """What a rank has written of its stack; it may take a moment on a busy machine."""
        file = stack_file(self.folder.name, rank)
        until = time.monotonic() + 2.0
        text = ""
        while time.monotonic() < until:
            now = file.read_text(errors="replace") if file.exists() else ""
            if now and now == text:
                break
            text = now
            time.sleep(0.05)
        return text

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        living = [pid for pid in self.pids if pid]
        for pid in living:
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(RuntimeError):  # the server is gone, and its ranks with it
            for pid in living:
                self.server.ended(pid)
        self.folder.cleanup()


def named(ranks: list[int]) -> str:
    """``rank 3``, or ``ranks 1, 2``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _is_consequence(failure: Failure) -> bool:
    return failure.cause != "ProcessDied" and bool(_CONSEQUENCE.search(failure.message))


def _error_of(failures: dict[int, Failure]) -> RankError:
    """The first error that is not about a lost peer, and what the others say."""
    rank = min(failures, key=lambda r: (_is_consequence(failures[r]), failures[r].seconds, r))
    cause = failures.pop(rank)
    same = [
        r for r, f in failures.items() if (f.cause, f.where) == (cause.cause, cause.where)
    ]  # all said the same: once is enough
    others = {r: _sentence(r, f) for r, f in sorted(failures.items()) if r not in same}
    return RankError(rank, cause, others)


def free_bytes() -> int | None:
    """Memory that is free, within the limit of the container; None where nobody tells."""
    free = []
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free += [int(found[1]) << 10] if found else []
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())  # ValueError: "max"
        free.append(most - int((group / "memory.current").read_text()))
    return min(free, default=None)


def room(world: int, idle: int = 0) -> None:
    """Raise UserError if the machine cannot hold ``world`` ranks; ``idle`` others would go."""
    free = free_bytes()
    if free is not None and (free + idle * RANK_BYTES) < world * RANK_BYTES:
        raise UserError(
            f"{world} ranks need about {world * RANK_BYTES / 2**30:.1f} GiB here "
            f"({RANK_BYTES >> 20} MiB each), and {free / 2**30:.1f} GiB are free; at most "
            f"{(free + idle * RANK_BYTES) // RANK_BYTES} ranks"
        )


class RankPool:
    """``pool.run(fn, *args, world=2)`` calls ``fn`` on every rank; returns values by rank.

    Raises RankError when a rank does, RankHang (a TimeoutError) when one does not answer, UserError
    when the machine cannot hold so many ranks. ``backend``: of the process groups.
    """

    def __init__(self, backend: str = "gloo") -> None:
        self.backend = backend
        self.worlds: dict[int, Future[_World]] = {}
        self._starter = ThreadPoolExecutor(1, "rank-pool")
        server.start()

    def prepare(self, *worlds: int) -> None:
        """Start worlds of these sizes, one after the other, beside what the caller does next.

        As many as there is memory for; `run` starts the others, in the place of these.
        """
        ahead = 0
        for world in [w for w in dict.fromkeys(worlds) if w not in self.worlds]:
            with contextlib.suppress(UserError):
                room(ahead + world)
                self._start(world)
                ahead += world

    def _start(self, world: int) -> None:
        if world not in self.worlds:
            self.worlds[world] = self._starter.submit(_World, world, self.backend)

    def run(
        self, fn: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 90, **kw: Any
    ) -> list[Any]:
        """See the class. ``timeout`` is in seconds, between answers."""
        if world not in self.worlds:
            self._make_room(world)
            self._start(world)
        try:
            return self.worlds[world].result().run(fn, args, kw, timeout)
        except BaseException:
            self._stop([world])
            raise

    def room(self, world: int) -> None:
        """Raise UserError if the machine cannot hold ``world`` ranks, all others stopped."""
        room(world, sum(self.worlds))

    def _make_room(self, world: int) -> None:
        """Stop worlds, the largest first, until there is memory for another."""
        for other in sorted(self.worlds, reverse=True):
            with contextlib.suppress(UserError):
                return room(world)
            self._stop([other])
        room(world)

    def _stop(self, worlds: Iterable[int]) -> None:
        for world in worlds:
            future = self.worlds.pop(world)
            if not future.cancel() and future.exception() is None:
                future.result().stop()

    def close(self) -> None:
        """Stop all ranks."""
        self._stop(list(self.worlds))
        self._starter.shutdown()
