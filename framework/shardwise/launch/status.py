"""How a run has fared over all its attempts, from its folder alone.

**Goodput** is the share of the wall time since the first attempt began that was spent in steps
which count in the end: those that ``metrics.jsonl`` holds, which loses the ones that are done again
after a resume. Waiting for a scheduler, starting, loading, compiling before the first step, saving,
validating and steps that were lost are the rest. Of a run that is not alive, only steps up to its
newest checkpoint count, since the others will be done again. With ``logging.every`` above 1 a line
stands for the steps since the line before it.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shardwise.errors import ExitCode, UserError
from shardwise.metrics.progress import duration
from shardwise.report.rundata import RunData, load_run
from shardwise.resilience import attempts
from shardwise.resilience.attempts import Attempt
from shardwise.storage.lock import alive


@dataclasses.dataclass(frozen=True)
class StageStatus:
    """``logged``: the newest step in the metrics; ``committed``: of the newest checkpoint."""

    name: str
    logged: int
    committed: int
    steps: int | None


@dataclasses.dataclass(frozen=True)
class Status:
    """``goodput`` from 0 to 1, None before the first step; all times in seconds."""

    run: str
    state: Literal["running", "done", "stopped", "lost", "not begun"]
    attempts: list[Attempt]
    stages: list[StageStatus]
    wall_seconds: float
    step_seconds: float
    goodput: float | None


def status(run: Path) -> Status:
    """Read a run's folder. Raises UserError where there is no run, DataError for damaged files."""
    known = attempts.read(run)
    try:
        data = load_run(run)
    except UserError:
        if not known:
            raise
        data = RunData(run.name)
    living = alive(run)
    committed = attempts.committed_steps(run)
    last = known[-1] if known else None
    done = last is not None and last.exit_code == ExitCode.DONE
    stages, seconds = [], 0.0
    for name in data.stages:
        times = data.get(name, "step_seconds")
        counted = times.steps
        if not (living or done):
            counted = counted[counted <= committed.get(name, 0)]
        widths = np.diff(counted, prepend=0)
        seconds += float(np.sum(times.values[: len(counted)] * widths))
        logged = int(times.steps[-1]) if len(times) else 0
        total = data.stage_config(name).get("steps")
        stages.append(StageStatus(name, logged, committed.get(name, 0), total))
    began = next((a.began for a in known if a.began), None)
    until = last.ended if last and last.ended and not living else time.time()
    if last and not last.ended and not living:  # it was killed: what it logged last
        until = data.last_time or last.began or until
    wall = max(0.0, until - began) if began else 0.0
    return Status(
        str(run), _state(last, living), known, stages, wall, seconds,
        min(1.0, seconds / wall) if wall and any(stage.logged for stage in stages) else None,
    )  # fmt: skip


def _state(last: Attempt | None, living: bool) -> Any:
    if living:
        return "running"
    if last is None:
        return "not begun"
    if last.exit_code is None:
        return "lost"
    return "done" if last.exit_code == ExitCode.DONE else "stopped"


def as_text(found: Status) -> str:
    """For a terminal."""
    lines = [f"{found.run}: {found.state}, attempts: {len(found.attempts)}"]
    for stage in found.stages:
        of = f" of {stage.steps}" if stage.steps else ""
        lines.append(f"  {stage.name}: step {stage.logged}{of}, saved {stage.committed}")
    if found.goodput is not None:
        lines.append(
            f"  goodput: {100 * found.goodput:.1f} % ({duration(found.step_seconds)} in steps that "
            f"count, of {duration(found.wall_seconds)} since the first attempt began)"
        )
    for attempt in found.attempts:
        lines += _attempt(attempt)
    return "\n".join(lines)


def _attempt(attempt: Attempt) -> list[str]:
    moment = attempt.began or attempt.ended or 0.0
    when = datetime.datetime.fromtimestamp(moment).isoformat(" ", "seconds")
    ranks = f"{attempt.world} rank{'s' if attempt.world > 1 else ''}"
    hosts = f"{ranks} on {', '.join(attempt.hosts)}" if attempt.hosts else "not begun"
    lasted = duration(attempt.ended - attempt.began) if attempt.began and attempt.ended else "-"
    steps = f"steps {sum(attempt.start.values())} to {sum(attempt.reached.values())}"
    if attempt.ended is None:
        steps = f"from step {sum(attempt.start.values())}"
    first = f"  attempt {attempt.number}  {when}  {lasted}  {steps}  {hosts}  {attempt.id}"
    if attempt.exit_code is None:
        return [first]
    reason = (attempt.reason.splitlines() or [""])[0]
    return [first, f"    ended with {attempt.exit_code}: {reason}"]
