"""Contestants that take turns: A B C, A B C, and so on, each in a process of its own.

That is how a user would run them: what one does to the memory allocator or to the threads is not
the others' gain or loss. A disturbance of the machine falls on all of them. Who waits is blocked on
a pipe.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

from common import clock, use_threads

from shardwise.metrics.timing import Laps


class Lap:
    """A contestant's end: `start` waits for its first turn, a call ends a turn and waits again."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.began = 0.0

    def start(self) -> None:
        """Wait for the first turn."""
        self.pipe.recv()
        self.began = clock.now()

    def __call__(self) -> bool:
        """Report the turn's seconds; false when there is no further turn."""
        self.pipe.send(clock.now() - self.began)
        more = bool(self.pipe.recv())
        self.began = clock.now()
        return more


def _enter(run: Callable[[Lap], None], threads: int, clock_kind: str, pipe: Connection) -> None:
    use_threads(threads)
    clock.kind = clock_kind
    run(Lap(pipe))


class Contest:
    """Starts the contestants; what they exchange before the race goes through ``pipes``."""

    def __init__(self, contestants: Mapping[str, Callable[[Lap], None]], threads: int) -> None:
        self.pipes: dict[str, Connection] = {}
        self.processes = []
        context = multiprocessing.get_context("spawn")
        for name, run in contestants.items():
            self.pipes[name], theirs = context.Pipe()
            arguments = (run, threads, clock.kind, theirs)
            self.processes.append(context.Process(target=_enter, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()  # so that its end is noticed

    def run(self, turns: int, warmup: int) -> Laps:
        """All turns, the first ``warmup`` not counted; raises EOFError if a contestant dies."""
        laps = Laps()
        for number in range(warmup + turns):
            for name, pipe in self.pipes.items():
                pipe.send(True)
                seconds = pipe.recv()
                if number >= warmup:
                    laps.add(name, seconds)
        for pipe in self.pipes.values():
            pipe.send(False)
        for process in self.processes:
            process.join()
        return laps
