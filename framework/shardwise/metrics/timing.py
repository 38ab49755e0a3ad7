"""How contestants are timed: in turns, and with what everyone else burns beside them.

The rules of the benchmarks: what warms up is not counted; A B C, A B C, and a ratio compares within
a turn; what other processes burn is measured beside it, and a figure of a busy machine says so.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

MAX_OTHERS = 0.10  # cores that other processes may burn, for a figure to be believed
LOOK_SECONDS = 2.0  # for which a machine is looked at, to tell whether it is quiet


class Laps:
    """Seconds a step of several contestants, measured in turns: A B C, A B C, and so on.

    A disturbance of the machine then falls on all of them, and `ratio` compares within a turn.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        """One more turn of ``name``."""
        self.seconds.setdefault(name, []).append(seconds)

    def median(self, name: str) -> float:
        """Median seconds of a turn."""
        return statistics.median(self.seconds[name])

    def ratio(self, ours: str, peer: str) -> float:
        """How many times faster ``ours`` is: the median over turns of peer / ours."""
        pairs = zip(self.seconds[ours], self.seconds[peer], strict=True)
        return statistics.median(p / o for o, p in pairs)


def load() -> str:
    """The machine's load average over one minute; a benchmark wants it near zero at its start."""
    return f"{os.getloadavg()[0]:.2f}"


def busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """Processor seconds that the machine has spent on anything; None where it does not say."""
    if not stat.exists():
        return None
    fields = [int(f) for f in stat.read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


class Neighbours:
    """What everyone but the contestant whose turn it is burns, during turns."""

    def __init__(self, busy: Callable[[], float | None] = busy_seconds) -> None:
        self.busy = busy
        self.others = self.wall = 0.0
        self.known = True
        self._before: float | None = None

    def begin(self) -> None:
        """A turn begins."""
        self._before = self.busy()

    def end(self, seconds: float, burnt: float) -> None:
        """It has ended after ``seconds``; its own processes burnt so many processor seconds."""
        after = self.busy()
        if self._before is None or after is None:
            self.known = False
        else:
            self.others += after - self._before - burnt
            self.wall += seconds

    @property
    def cores(self) -> float:
        """Cores burnt by others, on average; not a number where the machine does not say."""
        return max(0.0, self.others) / self.wall if self.known and self.wall else float("nan")

    @property
    def quiet(self) -> bool:
        """Whether a ratio may be believed."""
        return self.cores <= MAX_OTHERS


def wait_for_quiet(
    max_others: float,
    wait_s: float,
    busy: Callable[[], float | None] = busy_seconds,
    sleep: Callable[[float], object] = time.sleep,
) -> float:
    """Wait until all processes together burn at most ``max_others`` cores, for ``wait_s`` at most.

    Returns the cores that they burn at the last look; not a number where the machine does not say.
    """
    waited = 0.0
    while True:
        look = Neighbours(busy)
        look.begin()
        sleep(LOOK_SECONDS)
        look.end(LOOK_SECONDS, 0.0)
        waited += LOOK_SECONDS
        if not look.known or look.cores <= max_others or waited >= wait_s:
            return look.cores
