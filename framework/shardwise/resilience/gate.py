"""Where a rank's main thread stands, and how far it may go.

A run can be cut only where a resume goes on exactly: after one update and before the next, and
not inside a save, which all ranks make together. The main thread passes the gate before it
changes weights and before it saves. A thread that wants to cut the run closes the gate, learns
where the other ranks stand, and lets the main thread go on to where all of them can be cut. In
between the main thread may compute, wait, compile or sleep: the state to save does not change.

A position is (number of the stage, 4 * steps done + phase), phases: 0 a step is complete, 1 its
metrics are noted and saved, 2 that is done, 3 the next one changes weights. At even ones the run
can be cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Position = tuple[int, int]
CONCLUDING, CONCLUDED, UPDATING, NEXT = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Point:
    """A state to go on from. ``save`` makes it durable: all ranks call it, from any thread."""

    stage: str
    step: int
    save: Callable[[], Path]
    durable: bool = False  # it is on disk already, or nothing has been computed yet


def cut_after(position: Position) -> Position:
    """The first position from here at which a run can be cut."""
    return position[0], position[1] + position[1] % 2


class Gate:
    """The main thread calls `stage`, `step`, `updating`, `completed`, `validating`, `concluding`
    and `park`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._position: Position = (-1, 0)
        self._limit: Position | None = None
        self._parked = False
        self._end: BaseException | None = None
        self.point: Point | None = None
        # What has begun ends so far beyond the newest complete step; 0: nothing has. All ranks
        # work on it together, in collectives, so while it can be ended no rank stands still.
        self.begun = 0
        self.slowest = 0.0  # seconds of the slowest step of this stage but its first; 0.0: none yet
        self._begun: float | None = None

    # --- the main thread ------------------------------------------------------------------------

    def stage(self, done: int, point: Point) -> None:
        """A stage begins, or goes on after ``done`` steps."""
        self.slowest, self._begun = 0.0, None
        self._move((self._position[0] + 1, 4 * done), point)

    def step(self) -> None:
        """The next step begins. Weights change only after `updating`."""
        self._begin(NEXT)

    def updating(self) -> None:
        """The first change of this step's weights is about to be made; waits while it may not."""
        stage, number = self._position
        if self.begun == NEXT and number % 4 != UPDATING:
            self._move((stage, number // 4 * 4 + UPDATING), self.point)

    def completed(self, done: int, point: Point) -> None:
        """``done`` steps are complete, their metrics noted; ``point`` is what they led to."""
        now = time.monotonic()
        if self._begun is not None:  # the first one compiles
            self.slowest = max(self.slowest, now - self._begun)
        self._begun = now
        self._move((self._position[0], 4 * done), point)

    def validating(self) -> None:
        """The validation of the newest step begins; `concluding` follows."""
        self._begin(CONCLUDED)

    @contextlib.contextmanager
    def concluding(self, after: Callable[[], Point]) -> Iterator[None]:
        """Around what follows a step once (its validation is noted, it is saved)."""
        stage, number = self._position
        base = number // 4 * 4
        self._move((stage, base + CONCLUDING), self.point)
        yield
        self._move((stage, base + CONCLUDED), after())

    def park(self, seconds: float) -> None:
        """Wait for the end that another thread prepares; raises it."""
        with self._changed:
            self._parked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._end is not None, seconds)
            self._raise()

    def _begin(self, what: int) -> None:
        with self._changed:
            self._wait_while(lambda limit: self._position >= limit)
            self.begun = what

    def _move(self, position: Position, point: Point | None) -> None:
        with self._changed:
            if position[1] % 2 == 1 or position[0] > self._position[0]:
                self._wait_while(lambda limit: position > limit)
            self._position, self.point = position, point
            between = position[1] % 2 == 0
            if between:
                self.begun = 0
            self._changed.notify_all()
            if between:  # no use in beginning what will not be finished
                self._wait_while(lambda limit: position >= limit)

    def _wait_while(self, beyond: Callable[[Position], bool]) -> None:
        while self._limit is not None and beyond(self._limit):
            self._raise()
            self._parked = True
            self._changed.notify_all()
            self._changed.wait()
        self._parked = False

    def _raise(self) -> None:
        if self._end is not None:
            raise self._end

    # --- the thread that cuts -------------------------------------------------------------------

    def close(self) -> Position:
        """Hold the main thread before its next change; returns where it stands."""
        with self._changed:
            self._limit = cut_after(self._position)
            return self._position

    def open_to(self, position: Position) -> None:
        """Let the main thread go on to ``position`` and no further."""
        with self._changed:
            self._limit = position
            self._changed.notify_all()

    def reached(self, position: Position, seconds: float) -> bool:
        """Wait until the main thread is at ``position`` or beyond; False: not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._position >= position, max(seconds, 0.0))

    def end(self, error: BaseException, patience: float = 1.0) -> bool:
        """Have the main thread raise ``error`` if it waits here; False: it does something else."""
        deadline = time.monotonic() + patience
        with self._changed:
            self._end = error
            self._changed.notify_all()
            while not self._parked and time.monotonic() < deadline:
                self._changed.wait(0.05)
            return self._parked
