"""What trials reached, read from their folders; and what repeats of a point say together."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from shardwise.errors import DataError
from shardwise.metrics.writers import METRICS_FILE
from shardwise.report.rundata import RunData, load_run
from shardwise.report.series import t_interval
from shardwise.resilience import attempts
from shardwise.resilience.ending import EXIT_FILE
from shardwise.sweep.config import Point
from shardwise.sweep.objective import Curve, Objective
from shardwise.sweep.plan import Plan
from shardwise.sweep.trial import TRIAL_FILE, Trial

State = Literal["waiting", "running", "open", "done", "pruned", "failed", "impossible"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One trial. ``value``: of the objective, so far. ``seconds``: from its start to its end."""

    name: str
    number: int
    repeat: int
    point: Point
    state: State
    reason: str = ""
    value: float | None = None
    curve: Curve = dataclasses.field(default_factory=list)
    step: int = 0
    seconds: float | None = None
    ended: float | None = None  # seconds since the epoch
    tokens_per_second: float | None = None
    memory_gb: float | None = None
    run: RunData | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One point: the mean of its finished runs, half its 95 % interval (None: of one run)."""

    number: int
    point: Point
    state: State
    value: float | None
    half: float | None
    runs: int
    results: list[Result]


class Reader:
    """Results of a sweep; a folder is read again only when it has changed."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._known: dict[str, tuple[Any, Result]] = {}

    def read(self, plan: Plan, running: Sequence[str] = ()) -> list[Result]:
        """Every trial, and what is impossible, by number and repeat."""
        found = [self._trial(trial, trial.name in running) for trial in plan.trials]
        for name, (number, repeat, point, reason) in plan.impossible.items():
            found.append(Result(name, number, repeat, point, "impossible", reason))
        return sorted(found, key=lambda result: (result.number, result.repeat))

    def _trial(self, trial: Trial, running: bool) -> Result:
        status, reason = trial.status()
        state: State = status
        if status == "open":
            started = (trial.folder / METRICS_FILE).exists()
            state = "running" if running else "open" if started else "waiting"
        stamp = (state, *(_stamp(trial.folder / n) for n in (METRICS_FILE, EXIT_FILE)))
        known = self._known.get(trial.name)
        if known is None or known[0] != stamp:
            known = self._known[trial.name] = stamp, self._read(trial, state, reason)
        return known[1]

    def _read(self, trial: Trial, state: State, reason: str) -> Result:
        plain = Result(trial.name, trial.number, trial.repeat, trial.point, state, reason)
        try:
            run = load_run(trial.folder)
        except DataError as error:  # it has logged nothing, or what it wrote is damaged
            told = str(error) if (trial.folder / METRICS_FILE).exists() else ""
            return dataclasses.replace(plain, reason=reason or told)
        series = self.objective.series(run)
        curve = list(zip(series.steps.tolist(), series.values.tolist()))
        steps = [int(s.steps[-1]) for s in run.series.values() if len(s)]
        memory = run.get(self.objective.stage, "memory_gb").last
        speeds = run.get(self.objective.stage, "tokens_per_second").values
        ended, seconds = _times(trial.folder)
        return dataclasses.replace(
            plain,
            value=self.objective.reached(run),
            curve=curve,
            step=max(steps, default=0),
            seconds=seconds,
            ended=ended,
            tokens_per_second=float(statistics.median(speeds)) if len(speeds) else None,
            memory_gb=memory,
            run=run,
        )


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns


def _times(folder: Path) -> tuple[float | None, float | None]:
    """When it ended, and for how many seconds it ran: not those between its attempts."""
    try:
        ended = (folder / EXIT_FILE).stat().st_mtime
        seconds = ended - (folder / TRIAL_FILE).stat().st_mtime
    except OSError:
        return None, None
    several = attempts.read(folder)
    if len(several) > 1:
        pairs = [(a.began, a.ended) for a in several]
        seconds = sum(end - begin for begin, end in pairs if begin and end)
    return ended, seconds


def rows(results: Sequence[Result], objective: Objective) -> list[Row]:
    """A row for each point, the best first, those without a value last.

    What was pruned or still runs stands behind what has ended: its value is of an earlier step.
    """
    by_number: dict[int, list[Result]] = {}
    for result in results:
        by_number.setdefault(result.number, []).append(result)
    found = []
    for number, several in by_number.items():
        done = [r.value for r in several if r.state == "done" and r.value is not None]
        values = done or [r.value for r in several if r.value is not None][:1]
        mean, half = t_interval(values) if values else (None, None)
        found.append(Row(number, several[0].point, _state(several), mean, half, len(done), several))
    none = float("inf")
    return sorted(
        found,
        key=lambda row: (
            not row.runs,
            none if row.value is None else objective.sign * row.value,
            row.number,
        ),
    )


def _state(several: Sequence[Result]) -> State:
    """Of a point, by its runs: what is most worth to know."""
    states = [result.state for result in several]
    order: tuple[State, ...] = ("running", "open", "failed", "pruned", "impossible", "waiting")
    return next((state for state in order if state in states), "done")


def best(found: Sequence[Row]) -> Row | None:
    """The point that is ahead, of those that have ended."""
    return found[0] if found and found[0].runs else None


def remaining(
    results: Sequence[Result], running: dict[str, float], slots: int, steps: int, left: int
) -> float | None:
    """Seconds until all is done; None where nothing is known yet.

    ``running``: seconds that each running trial has had, by name. ``steps``: that a trial has, all
    stages together. ``left``: trials that have not started. Before the first trial has ended, its
    pace says it.
    """
    ended = [r.seconds for r in results if r.state in ("done", "pruned") and r.seconds]
    progress = {
        r.name: running[r.name] / r.step * steps for r in results if r.name in running and r.step
    }
    lengths = ended or list(progress.values())
    if not lengths:
        return None
    each = statistics.mean(lengths)
    rest = sum(max(progress.get(n, each) - seconds, 0.0) for n, seconds in running.items())
    return (rest + left * each) / max(1, min(slots, left + len(running)))
