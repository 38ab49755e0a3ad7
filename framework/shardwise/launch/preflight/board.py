"""Questions to ranks and their answers, over the rendezvous store, each with a deadline.

Rank 0 asks. It never waits for longer than it said: who does not answer is missing, and a step that
hangs in the kernel (a lost file system, a broken driver) is left behind in its thread.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from shardwise.errors import ShardwiseError

Step = Callable[..., Any]  # of place, board, seconds and JSON arguments; returns a JSON value
_SLACK = 1.0  # seconds for a step that notices its deadline to end, and for its answer to travel
_PATIENCE = 120.0  # how long a rank waits for the next question: rank 0 is alive and has deadlines


class Deadline:
    """A moment that does not move."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self, at_most: float = float("inf")) -> float:
        """Seconds until then, not below zero."""
        return max(0.0, min(self.end - time.monotonic(), at_most))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands: its rank, its node, and its number there."""

    rank: int
    world: int
    node: int
    local_rank: int
    local_world: int
    host: str

    @staticmethod
    def here() -> Place:
        """As torchrun or the local launcher says; alone without them."""
        rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return Place(
            rank,
            world,
            int(os.environ.get("GROUP_RANK", rank // local)),
            int(os.environ.get("LOCAL_RANK", rank % local)),
            local,
            os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a rank said. ``error``: what it raised, or that it hangs; "" if all is well."""

    value: Any = None
    error: str = ""


def within(seconds: float, steps: Mapping[str, Callable[[], Any]]) -> dict[str, Answer]:
    """Call all ``steps`` at once, each in a thread; who takes longer is left behind in it."""
    found: dict[str, Answer] = {}

    def call(name: str) -> None:
        try:
            found[name] = Answer(steps[name]())
        except ShardwiseError as error:
            found[name] = Answer(error=str(error))
        except Exception as error:
            found[name] = Answer(error=f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=call, args=(name,), daemon=True) for name in steps]
    deadline = Deadline(seconds)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline.left())
    late = Answer(error=f"did not end within {seconds:.0f} s: a file system or driver that hangs?")
    return {name: found.get(name, late) for name in steps}


class Board:
    """The store, and who is here. ``steps``: what may be asked, by name.

    Args:
        store: of torch.distributed; keys stay below ``preflight/``.
        place: of this process.
        steps: called as ``step(place, board, seconds, **arguments)``; one that takes much longer
            than it may is left behind.
    """

    def __init__(self, store: Any, place: Place, steps: Mapping[str, Step]) -> None:
        self.store, self.place, self.steps = store, place, steps
        self.missing: set[int] = set()
        self._number = itertools.count()

    def put(self, key: str, value: Any) -> None:
        """Store a JSON value."""
        self.store.set(f"preflight/{key}", json.dumps(value))

    def get(self, key: str, seconds: float) -> Any:
        """A JSON value, once it is there. Raises TimeoutError."""
        key = f"preflight/{key}"
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError as error:
            raise TimeoutError(f"no {key} within {seconds:.0f} s: {error}") from error
        return json.loads(self.store.get(key))

    def ask(
        self, step: str, ranks: Sequence[int], seconds: float, **arguments: Any
    ) -> dict[int, Answer]:
        """Have ``ranks`` do a step, this one too; their answers by rank.

        Whoever gives none in time joins `missing`, and is not waited for again.
        """
        number = next(self._number)
        ranks = [rank for rank in ranks if rank not in self.missing]
        order = {"step": step, "ranks": ranks, "seconds": seconds, "arguments": arguments}
        self.put(f"order/{number}", order)
        deadline = Deadline(seconds + 2 * _SLACK)
        answers = {}
        if self.place.rank in ranks:
            answers[self.place.rank] = self._do(order)
        for rank in ranks:
            if rank == self.place.rank:
                continue
            try:
                answers[rank] = Answer(**self.get(f"answer/{number}/{rank}", deadline.left()))
            except TimeoutError:
                self.missing.add(rank)
        return answers

    def end(self, verdict: Any) -> None:
        """Let all ranks go; waits for a moment until they have heard."""
        self.put(f"order/{next(self._number)}", {"end": verdict})
        deadline = Deadline(2 * _SLACK)
        for rank in set(range(1, self.place.world)) - self.missing:
            try:
                self.get(f"heard/{rank}", deadline.left())
            except TimeoutError:
                return

    def serve(self) -> Any:
        """Do what rank 0 asks until it ends; returns its verdict. Raises TimeoutError."""
        for number in self._number:
            order = self.get(f"order/{number}", _PATIENCE)
            if "end" in order:
                self.put(f"heard/{self.place.rank}", True)
                return order["end"]
            if self.place.rank in order["ranks"]:
                self.put(f"answer/{number}/{self.place.rank}", dataclasses.asdict(self._do(order)))
        raise AssertionError("numbers do not end")

    def _do(self, order: dict[str, Any]) -> Answer:
        step, arguments = self.steps[order["step"]], order["arguments"]
        call = functools.partial(step, self.place, self, order["seconds"], **arguments)
        return within(order["seconds"] + _SLACK, {"": call})[""]
