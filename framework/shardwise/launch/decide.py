"""What is to be done after an attempt has ended: once more, or stop. Schedulers ask this.

torchrun passes no rank's exit code on and a killed rank says nothing, so the run's folder decides:
`attempts` of the run, and the exit code of what the batch script started.

- done (0), a second turn was asked for (85): that.
- Diverged (3), mostly skipped (4), bad input (2), a bug (70), Ctrl-C (130): stop. Nothing would be
  different the next time.
- All else is a lost rank or node, a hardware fault, or a crash whose nature shows only when it
  comes again: once more, unless it is the third in a row that came to no further checkpoint.
  Attempts that ended with 85 were preempted, which is not their fault, and do not count among the
  three; but after ten in a row without progress, of either kind, the time they get is too short.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from shardwise.errors import ExitCode, exit_code_of_signal
from shardwise.resilience import attempts
from shardwise.resilience.attempts import Attempt

MAX_FAILED, MAX_FRUITLESS = 3, 10  # in a row, to no further checkpoint; with preempted ones
FINAL: dict[int, str] = {
    ExitCode.USAGE: "bad usage, config or data",
    ExitCode.DIVERGED: "diverged",
    ExitCode.MOSTLY_SKIPPED: "most updates were skipped",
    ExitCode.BUG: "a bug in shardwise",
    exit_code_of_signal(signal.SIGINT): "interrupted by hand",
}


@dataclasses.dataclass(frozen=True)
class Decision:
    """``exit_code``: 85 to start once more, else the run's own."""

    action: Literal["done", "requeue", "stop"]
    exit_code: int
    reason: str


def decide(run: Path, code: int) -> Decision:
    """What to do with the run in ``run`` after an attempt whose agent ended with ``code``.

    The attempt is that of this process's environment (`attempts.ATTEMPT`), or the last one. If it
    told no end it is given one here. Raises DataError.
    """
    id = os.environ.get(attempts.ATTEMPT, "")
    mine = _find(run, id)
    if mine is None or mine.exit_code is None:
        when = "before it began" if mine is None or mine.began is None else "without a word of it"
        attempts.end(run, code or ExitCode.FAILED, f"ended with exit code {code}, {when}", id)
        mine = _find(run, id)
    if mine is None or mine.exit_code is None:  # the disk took nothing
        return Decision("requeue", ExitCode.REQUEUE, f"ended with {code}; {run} takes no word")
    return judge([a for a in attempts.read(run) if a.number <= mine.number])


def judge(known: Sequence[Attempt]) -> Decision:
    """What the last of these attempts, which has ended, asks for."""
    last = known[-1]
    code = int(last.exit_code or 0)
    if code == ExitCode.DONE:
        return Decision("done", code, "done")
    if code in FINAL:
        return Decision("stop", code, f"{FINAL[code]}: {last.reason}")
    row = fruitless(known)
    failed = sum(attempt.exit_code != ExitCode.REQUEUE for attempt in row)
    if (failed >= MAX_FAILED and code != ExitCode.REQUEUE) or len(row) >= MAX_FRUITLESS:
        words = f"{len(row)} attempts in a row came to no further checkpoint: {last.reason}"
        return Decision("stop", ExitCode.FAILED if code == ExitCode.REQUEUE else code, words)
    return Decision("requeue", ExitCode.REQUEUE, last.reason)


def fruitless(known: Sequence[Attempt]) -> list[Attempt]:
    """The attempts at the end that came to no checkpoint which none before them had."""
    row: list[Attempt] = []
    best = 0
    for attempt in known:
        reached = sum(attempt.reached.values())
        row = [] if reached > max(best, sum(attempt.start.values())) else [*row, attempt]
        best = max(best, reached)
    return row


def _find(run: Path, id: str) -> Attempt | None:
    known = attempts.read(run)
    return next((a for a in reversed(known) if a.id == id or not id), None)
