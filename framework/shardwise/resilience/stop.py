"""SIGTERM, SIGUSR1 and SIGHUP: all ranks agree on one step, save it and end with exit code 85.

Python runs its own signal handlers between two byte codes of the main thread, which may be deep in
a collective, a compiler or a user's function. So a thread of ours learns of a signal from the
C-level wake-up descriptor. It tells the other ranks through the rendezvous store, half of the
grace period is given to the step in progress, and then the newest complete step is saved from this
thread, over a process group that the main thread does not use.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch.distributed as dist

from shardwise.config.schema import ResilienceConfig
from shardwise.errors import ExitCode, ShardwiseError, Stopped, exit_code_of_signal
from shardwise.resilience import ending
from shardwise.resilience.gate import Gate, Position, cut_after

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
TICK_SECONDS = 0.5
# A scheduler may signal a rank and the agent that forwards it, and on a hang-up both the shell and
# the kernel send SIGHUP: the same signal within this time is the first one, twice.
ECHO_SECONDS = 1.0
UNWATCHED_SECONDS = 10.0  # for which the store may fail before the run is taken for lost


class Watcher(Protocol):
    """What else the thread looks after, twice a second."""

    def tick(self) -> None: ...

    def gone(self) -> list[int]: ...


class _PeerEnded(Exception):  # noqa: N818
    """Without that rank nothing can be agreed upon."""


class Stop:
    """Waits for signals while it is entered."""

    joined = 0

    def __init__(self, config: ResilienceConfig, gate: Gate) -> None:
        self.config, self.gate = config, gate
        self.directory: Path | None = None  # of the run, where its end is written
        self.watchers: list[Watcher] = []
        self.store: Any = None
        self.rank, self.world = 0, 1
        self._first: tuple[int, float] | None = None  # the signal, and when it came
        self._failing: float | None = None  # since when the watchers cannot look
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._old: dict[int, Any] = {}

    # --- the main thread ------------------------------------------------------------------------

    def __enter__(self) -> Stop:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals belong to whoever owns the main thread
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = {n: signal.signal(n, _nothing) for n in heeded(SIGNALS)}
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        self._closing.set()
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def join(self, directory: Path) -> None:
        """The process group is there and the run's folder ours: stop together with the others."""
        self.directory = directory
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.world > 1:
            Stop.joined += 1  # runs of one process group, which all ranks count alike
            clone = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self.store = dist.PrefixStore(  # type: ignore[attr-defined]
                f"stop_{Stop.joined}", clone
            )

    def settle(self) -> None:
        """After an error: if the run is being stopped, wait for that and raise its end instead.

        Peers that have ended already look like failures to those that have not.
        """
        if self._first is None and self.store is not None:
            self._closing.wait(2 * TICK_SECONDS)  # a peer may have had the signal
        if self._first is not None:
            left = self._first[1] + self.config.grace_s - time.monotonic()
            self.gate.park(max(left, 0.0))

    # --- the thread -----------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closing.is_set():
            ready, _, _ = select.select([self._read], [], [], TICK_SECONDS)
            received = os.read(self._read, 64) if ready else b""
            for number in received:
                if number in SIGNALS:
                    self._signalled(number)
            if self._first is None and (number := self._asked_by_peer()):
                self._signalled(number)
            if self._first is not None:
                if time.monotonic() > self._first[1] + self.config.grace_s:
                    self._give_up(f"not saved within resilience.grace_s {self.config.grace_s:g}")
            else:
                self._tick()

    def _tick(self) -> None:
        try:
            for watcher in self.watchers:
                watcher.tick()
            self._failing = None
        except Exception as error:
            now = time.monotonic()
            if self._failing is None:
                log.warning("the ranks cannot be watched just now: %s", error)
            self._failing = self._failing or now
            if now > self._failing + UNWATCHED_SECONDS:  # the store is gone, and with it the run
                why = f"the ranks can no longer be watched, so a hang would last: {error}"
                self._leave_now(ShardwiseError(why))

    def _signalled(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (number, now)
            threading.Thread(target=self._stop, name="stopping", daemon=True).start()
        elif number != self._first[0] or now > self._first[1] + ECHO_SECONDS:
            self._give_up(f"and at once by a second signal, {signal.Signals(number).name}")

    def _asked_by_peer(self) -> int:
        try:
            if self.store is None or not self.store.check(["signal"]):
                return 0
            return int(self.store.get("signal"))
        except RuntimeError:  # the store is gone
            return 0

    def _give_up(self, why: str) -> None:
        assert self._first is not None
        number = self._first[0]
        self._leave_now(Stopped(f"{_stopped_by(number)}, {why}", exit_code_of_signal(number)))

    def _leave_now(self, error: ShardwiseError) -> None:
        if self.rank == 0 and self.directory is not None:
            ending.write_ending(self.directory, error.exit_code, f"{error}")
        ending.leave(error)

    # --- stopping -------------------------------------------------------------------------------

    def _stop(self) -> None:
        assert self._first is not None
        number = self._first[0]
        try:
            saved = self._cut(number)
        except _PeerEnded as error:  # the signal is but what a launcher then sends to the others
            self._leave(Stopped(f"{error}", ExitCode.FAILED))
        except Exception as error:
            text = f"{_stopped_by(number)}, not saved: {error}"
            self._leave(Stopped(text, exit_code_of_signal(number)))
        else:
            self._leave(
                Stopped(
                    f"{_stopped_by(number)}: {saved}; run the same command again to go on",
                    ExitCode.REQUEUE,
                )
            )

    def _leave(self, error: Stopped) -> None:
        if not self.gate.end(error):
            self._leave_now(error)

    def _cut(self, number: int) -> str:
        """Bring all ranks to one place between two updates and save; returns what is saved."""
        assert self._first is not None
        deadline = self._first[1] + self.config.grace_s
        self.gate.close()
        if self.store is not None:
            self.store.set("signal", str(number))
        for finish in (True, False):
            position, point = self.gate.close(), self.gate.point
            unsaved = point is not None and not point.durable
            mine = [*position, self.gate.begun, unsaved]
            target = decide(self._exchange(f"{finish}", mine, deadline), finish=finish)
            if target is None:
                where = f": {point.stage} is at step {point.step}" if point else ""
                return f"everything is saved{where}"
            self.gate.open_to(target)
            until = deadline - (self.config.grace_s / 2 if finish else 0.0)
            there = self.gate.reached(target, until - time.monotonic())
        if not there:
            raise TimeoutError("an update did not end in time")
        point = self.gate.point
        assert point is not None
        return f"saved {point.stage} step {point.step} ({point.save()})"

    def _exchange(self, key: str, mine: list[Any], deadline: float) -> list[list[Any]]:
        """What every rank says, by rank; through the store, which no stopped rank can block."""
        if self.store is None:
            return [mine]
        self.store.set(f"{key}/{self.rank}", json.dumps(mine))
        if self.rank == 0:
            said = [self._get(f"{key}/{rank}", deadline) for rank in range(self.world)]
            self.store.set(key, json.dumps(said))
        found: list[list[Any]] = self._get(key, deadline)
        return found

    def _get(self, key: str, deadline: float) -> Any:
        while not self.store.check([key]):
            if gone := [rank for watcher in self.watchers for rank in watcher.gone()]:
                raise _PeerEnded(ending.lost(gone))
            if time.monotonic() > deadline:
                raise TimeoutError("the ranks could not agree in time")
            time.sleep(0.02)
        return json.loads(self.store.get(key))


def decide(reports: Sequence[Sequence[Any]], *, finish: bool) -> Position | None:
    """Where to cut a run whose ranks stand as they say; None: there is nothing to save.

    A report is (stage, number, what has begun (`Gate.begun`), whether there is something to save).
    ``finish``: go on to the end of the step, or of its validation, that has begun.
    """
    if not any(unsaved or (finish and begun) for _, _, begun, unsaved in reports):
        return None
    stage, number, begun = max((s, n, b) for s, n, b, _ in reports)
    if number % 2 == 0 and finish and begun:
        return stage, number // 4 * 4 + begun
    return cut_after((stage, number))


def _stopped_by(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}"


def heeded(numbers: Sequence[signal.Signals]) -> list[signal.Signals]:
    """Those that whoever started this process does not have it ignore, as ``nohup`` does."""
    return [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Python must have a handler for the wake-up descriptor to be written."""
