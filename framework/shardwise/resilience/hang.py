"""A run that stands still is noticed, and the rank at fault named with the stacks of all.

Every rank has a heart: a thread (that of `stop`) which tells the rendezvous store every two
seconds how far its main thread is. Each rank looks at those on its own host, the lowest rank that
is alive at all. What a rank does is read from the kernel, not guessed from silence: a stopped
process (state T) is at fault, one whose CPU time advances is busy, however long it holds the
interpreter (a compiler, a kernel build, a tokenizer, a save), one that holds the interpreter and
sleeps is at fault. A host all of whose ranks are silent for long is lost. That all wait in
collectives while nobody computes is a deadlock, and the sequence numbers tell who left one out.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwise.checkpoint.manifest import PeerLostError
from shardwise.errors import ShardwiseError
from shardwise.resilience import ending, process
from shardwise.resilience.gate import NEXT
from shardwise.resilience.sequence import Call, Collectives, divergence
from shardwise.resilience.stop import TICK_SECONDS, Stop
from shardwise.storage.lock import machine

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
GATHER_SECONDS = 5.0  # for the stacks of all ranks
LOST_SECONDS = 60.0  # without a word from any rank of a host; or timeout_s, if that is longer
VERDICT_SECONDS = 60.0  # for the one that judges to say what it found
IDLE_SHARE = 0.05  # of a core; a process that uses less computes nothing


# Timeout of process groups while hearts watch: they must not call a rank late that works.
BACKSTOP_S = 2e6  # below 2^31 milliseconds


@contextlib.contextmanager
def watched(stop: Stop, logs: Path, timeout_s: float) -> Iterator[None]:
    """Look after this rank and its peers, from the thread of ``stop``; a single one has none."""
    if stop.store is None:
        yield
        return
    with Collectives().watched() as collectives:
        heart = Heart(stop, logs, collectives, timeout_s)
        stop.watchers.append(heart)
        try:
            yield
        except Exception as error:
            if ending.CONSEQUENCE.search(str(error)) and (lost := heart.wait_for_gone()):
                raise PeerLostError(ending.lost(lost)) from error
            raise
        finally:
            stop.watchers.clear()
            heart.close()


class HangError(ShardwiseError):
    """The run stands still; the message names the rank at fault."""


class _Seen:
    """What is known of a rank, by this process's clock."""

    def __init__(self) -> None:
        self.beat: dict[str, Any] = {}
        self.beaten = 0.0  # when the newest beat came
        self.stopped: float | None = None  # since when
        self.asleep: tuple[float, float] | None = None  # since when silent and idle, at what CPU
        self._idle = (0.0, 0.0)

    def take(self, beat: dict[str, Any], now: float) -> None:
        """A beat as read from the store; it may be the one before."""
        if beat["number"] == self.beat.get("number"):
            return
        if not self.beat:
            self._idle = (now, beat["cpu"])
        self.beat, self.beaten = beat, now
        since, cpu = self._idle
        if beat["cpu"] - cpu > IDLE_SHARE * (now - since):
            self._idle = (now, beat["cpu"])

    def idle(self, now: float) -> float:
        """For how many seconds it and its children have computed next to nothing."""
        return now - self._idle[0]

    @property
    def waits(self) -> float:
        """For how many seconds its main thread has waited in a collective."""
        return float(self.beat["waits"])


class Heart:
    """Tells of this rank and looks after others; `tick` is called about twice a second."""

    def __init__(self, stop: Stop, logs: Path, collectives: Collectives, timeout_s: float) -> None:
        """``timeout_s``: for how long ranks wait in a step for one that sleeps or computes."""
        self.config, self.gate, self.store = stop.config, stop.gate, stop.store
        self.rank, self.world = stop.rank, stop.world
        self.logs, self.collectives, self.timeout_s = logs, collectives, timeout_s
        self.main = threading.main_thread().ident or 0
        self.seen: dict[int, _Seen] = {}
        self._next = self._ticked = self._unsure = 0.0
        self._number = 0
        self._dumped: float | None = None  # when
        logs.mkdir(parents=True, exist_ok=True)
        self._stacks = stacks_file(logs, self.rank).open("w")
        # Without the interpreter: for a rank that is stopped (by a peer) or holds it (by itself).
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        calls_file(logs, self.rank).unlink(missing_ok=True)
        self.host = " ".join(machine().values())
        self._beat()  # so that a rank which stops at once is known

    def close(self) -> None:
        """Give the signal back."""
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()

    def tick(self) -> None:
        """See the class."""
        if self.store.check(["dump"]):
            self._dump()
            if self.store.check(["verdict"]):
                ending.leave(HangError(self.store.get("verdict").decode()))
            if self._dumped and time.monotonic() > self._dumped + VERDICT_SECONDS:
                ending.leave(HangError("the run stands still; which rank is at fault was not told"))
            return
        now = time.monotonic()
        if self._ticked and now > self._ticked + 3 * BEAT_SECONDS:  # as after `docker pause`
            self.collectives.resumed = now
            self.seen.clear()
            self._next, self._unsure = 0.0, now + 3 * BEAT_SECONDS  # the others resume too
        self._ticked = now
        if now < self._next:
            return
        self._next = now + BEAT_SECONDS
        self._beat()
        self._listen(now)
        if now >= self._unsure:
            self._judge(now)

    def _listen(self, now: float) -> None:
        """Read all beats that there are, in few round trips."""
        ranks = list(range(self.world))
        if not self.store.check([f"beat/{rank}" for rank in ranks]):
            ranks = [rank for rank in ranks if self.store.check([f"beat/{rank}"])]
        keys = [f"beat/{rank}" for rank in ranks]
        extended = self.store.has_extended_api()
        beats = self.store.multi_get(keys) if extended else map(self.store.get, keys)
        for rank, beat in zip(ranks, beats, strict=True):
            self.seen.setdefault(rank, _Seen()).take(json.loads(beat), now)

    def _beat(self) -> None:
        self._number += 1
        calls = self.collectives.calls
        mine = {
            "number": self._number,
            "host": self.host,
            "pid": os.getpid(),
            "waits": self.collectives.waiting(self.main),
            "at": calls[-1][1].number if calls else 0,
            "cpu": process.cpu_seconds(os.getpid()),
            "stepping": self.gate.begun == NEXT,
            "slowest": self.gate.slowest,
        }
        self.store.set(f"beat/{self.rank}", json.dumps(mine))

    def gone(self) -> list[int]:
        """Ranks of this host whose process is no more."""
        here = {r: s.beat["pid"] for r, s in self.seen.items() if s.beat["host"] == self.host}
        return [r for r, pid in here.items() if process.gone(pid)]

    def wait_for_gone(self, seconds: float = 2.0) -> list[int]:
        """`gone`, once a rank is, for at most ``seconds``."""
        deadline = time.monotonic() + seconds
        while not (found := self.gone()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _judge(self, now: float) -> None:
        for rank, seen in self.seen.items():
            if rank != self.rank and seen.beat["host"] == self.host:
                self._look(rank, seen, now)
        alive = [r for r, s in self.seen.items() if now - s.beaten < self.config.stopped_s]
        if alive and min(alive) == self.rank and len(self.seen) == self.world:
            self._look_at_all(now)

    def _look(self, rank: int, seen: _Seen, now: float) -> None:
        """A neighbour, by what the kernel says of its process."""
        state = process.state(seen.beat["pid"])
        seen.stopped = (seen.stopped or now) if state in ("T", "t") else None
        if seen.stopped is not None and now - seen.stopped > self.config.stopped_s:
            self._end(rank, f"rank {rank} is stopped (SIGSTOP, a debugger, a frozen container)")
        silent = now - seen.beaten
        if state in ("R", "D") or silent <= 2 * BEAT_SECONDS:
            seen.asleep = None
        else:
            cpu = process.cpu_seconds(seen.beat["pid"])
            if seen.asleep is None or cpu - seen.asleep[1] > IDLE_SHARE * (now - seen.asleep[0]):
                seen.asleep = (now, cpu)
            elif now - seen.asleep[0] > self.config.stuck_s:
                self._end(rank, f"rank {rank} holds the interpreter (the GIL) and sleeps")

    def _look_at_all(self, now: float) -> None:
        waiting = {r: s for r, s in self.seen.items() if s.waits > self.config.stuck_s}
        fresh = all(now - s.beaten < 3 * BEAT_SECONDS for s in self.seen.values())
        if len(waiting) == self.world and fresh:
            if all(s.idle(now) > self.config.stuck_s for s in self.seen.values()):
                self._end(None, "every rank waits in a collective for another")
            return
        self._look_at_hosts(now, waiting)
        for rank, seen in self.seen.items():
            if rank in waiting or not waiting or not seen.beat["stepping"]:
                continue
            patience = max(self.timeout_s, 10.0 * seen.beat["slowest"])
            if min(s.waits for s in waiting.values()) > patience and seen.beat["slowest"]:
                does = "sleeps" if seen.idle(now) > self.config.stuck_s else "computes"
                self._end(rank, f"rank {rank} {does} while the others wait for it")

    def _look_at_hosts(self, now: float, waiting: Mapping[int, _Seen]) -> None:
        hosts: dict[str, list[int]] = {}
        for rank, seen in self.seen.items():
            hosts.setdefault(seen.beat["host"], []).append(rank)
        for host, ranks in hosts.items():
            silent = min(now - self.seen[rank].beaten for rank in ranks)
            others_wait = any(rank not in ranks for rank in waiting)
            if host != self.host and others_wait and silent > max(self.timeout_s, LOST_SECONDS):
                names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
                self._end(ranks[0], f"the host of {names} is lost, silent for {silent:.0f} s")

    # --- the end --------------------------------------------------------------------------------

    def _end(self, rank: int | None, what: str) -> None:
        """Gather the stacks and the calls of all ranks, name the one at fault, end the run."""
        if self.store.compare_set("judge", "", str(self.rank)).decode() != str(self.rank):
            return
        stacks: list[str] = []
        try:
            self.store.set("dump", "1")
            self._gather(rank)
            stacks = [_last_frames(stacks_file(self.logs, r), r) for r in range(self.world)]
            if rank is None and (found := divergence(self._histories())):
                what = found[1]
        except Exception as failure:  # the end itself must not depend on what is told of it
            log.warning("not all could be gathered of a run that stands still: %s", failure)
        text = f"the run stands still: {what}; stacks of all ranks: {self.logs}/rank_*.stacks"
        text = "\n".join([text, *stacks])
        with contextlib.suppress(RuntimeError):  # the store is gone: we end all the same
            self.store.set("verdict", text)
            time.sleep(3 * TICK_SECONDS)  # the others say the same, before a launcher stops them
        ending.write_ending(self.logs.parent, HangError.exit_code, text)
        error = HangError(text)
        error.add_note(ending.TOLD_HERE)
        ending.leave(error)

    def _gather(self, rank: int | None) -> None:
        """Wait until all ranks have written; ``rank`` may be unable to."""
        self._dump()
        if rank is not None and self.seen[rank].beat["host"] == self.host:
            self._dump_of(rank)
        deadline = time.monotonic() + GATHER_SECONDS
        while time.monotonic() < deadline and not all(
            stacks_file(self.logs, r).exists() and stacks_file(self.logs, r).stat().st_size
            for r in range(self.world)
        ):
            time.sleep(0.1)

    def _dump(self) -> None:
        """The calls, then the stacks: whoever sees these finds those whole."""
        if self._dumped:
            return
        self._dumped = time.monotonic()
        try:
            made = self.collectives.calls.copy()  # other threads go on
            calls = [list(call) for thread, call in made if thread == self.main]
            path = calls_file(self.logs, self.rank)
            path.with_suffix(".tmp").write_text(json.dumps(calls))
            path.with_suffix(".tmp").replace(path)
        finally:
            faulthandler.dump_traceback(file=self._stacks, all_threads=True)

    def _dump_of(self, rank: int) -> None:
        """The stacks of a neighbour that cannot act: it writes them as it wakes, then stands."""
        path = stacks_file(self.logs, rank)
        with contextlib.suppress(OSError):  # it has just ended
            for number in (signal.SIGUSR2, signal.SIGCONT):
                os.kill(self.seen[rank].beat["pid"], number)
            until = time.monotonic() + 0.2
            while not path.stat().st_size and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(self.seen[rank].beat["pid"], signal.SIGSTOP)

    def _histories(self) -> dict[int, list[Call]]:
        found = {}
        for rank in range(self.world):
            with contextlib.suppress(OSError, ValueError, TypeError):  # it wrote none
                rows = json.loads(calls_file(self.logs, rank).read_text())
                found[rank] = [Call(tuple(g), n, o, tuple(s), *more) for g, n, o, s, *more in rows]
        return found


def stacks_file(logs: Path, rank: int) -> Path:
    """Where a rank writes its stacks when the run stands still."""
    return logs / f"rank_{rank}.stacks"


def calls_file(logs: Path, rank: int) -> Path:
    """Where a rank then writes its newest collectives."""
    return logs / f"rank_{rank}.collectives.json"


def _last_frames(path: Path, rank: int, shown: int = 4) -> str:
    """The innermost frames of the main thread, which faulthandler writes last."""
    text = path.read_text() if path.exists() else ""
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', text.rpartition("hread 0x")[2])
    places = [f"{Path(file).name}:{line} {name}" for file, line, name in frames[:shown]]
    return f"  rank {rank}: {' < '.join(places)}" if places else f"  rank {rank}: no stack"
