"""Every attempt at a run: ``attempts.jsonl`` in its folder, a line at its start and at its end.

An attempt is what one command, or one turn of a scheduler's job, started. Rank 0 writes when it has
the folder, and wherever ``exit.json`` is written; of one that could say nothing (killed, or ended
before it had the folder), `shardwise launch decide` writes the end.

start   attempt, id, time, scheduler, job, hosts, world, layout by stage, steps by stage
end     attempt, id, time, exit_code, reason, steps by stage

``steps``: of the newest committed checkpoint of each stage, from which the next attempt goes on.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise import terminal
from shardwise.checkpoint.steps import list_steps
from shardwise.config.redact import redact
from shardwise.errors import DataError, ShardwiseError
from shardwise.metrics.jsonl import JsonLines, read_jsonl

ATTEMPTS_FILE = "attempts.jsonl"
# What a job that `shardwise launch` rendered sets: its run's folder, and which attempt this is, as
# SCHEDULER.JOB.RESTARTS.
RUN, ATTEMPT = "SHARDWISE_RUN", "SHARDWISE_ATTEMPT"
_HEAD = {"event", "id", "time", "steps"}
_KEYS = {
    True: _HEAD | {"scheduler", "job", "hosts", "world", "layout"},  # of a start
    False: _HEAD | {"exit_code", "reason"},
}
_mine: dict[Path, str] = {}  # the attempts that this process began, by folder


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt. Times in seconds since the epoch; None: it never began, or has no end yet."""

    number: int
    id: str
    began: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    reason: str = ""
    scheduler: str = ""
    job: str = ""
    hosts: tuple[str, ...] = ()  # each once, in the order of their ranks
    world: int = 0
    layout: Mapping[str, str] = dataclasses.field(default_factory=dict)
    start: Mapping[str, int] = dataclasses.field(default_factory=dict)
    reached: Mapping[str, int] = dataclasses.field(default_factory=dict)


def committed_steps(directory: Path) -> dict[str, int]:
    """The newest committed step of each stage that has one."""
    roots = sorted(directory.glob("stages/*/checkpoints"))
    return {root.parent.name: steps[-1] for root in roots if (steps := list_steps(root))}


def attempt_id(token: str = "") -> str:
    """Which attempt this process belongs to; ``token`` tells a local launch from the others."""
    if given := os.environ.get(ATTEMPT):
        return given
    if run_id := os.environ.get("TORCHELASTIC_RUN_ID"):
        return f"torchrun.{run_id}.{time.time_ns() // 1_000_000}"
    return f"local.{os.uname().nodename}.{token or time.time_ns() // 1_000_000}"


def begin(directory: Path, hosts: Sequence[str], layout: Mapping[str, str], id: str) -> None:
    """Note that an attempt starts. ``hosts``: of every rank. Raises StorageError."""
    _mine[directory] = id
    scheduler, _, job = id.partition(".")
    about = {"scheduler": scheduler, "job": job, "hosts": list(dict.fromkeys(hosts))}
    _append(directory, "start", id, {**about, "world": len(hosts), "layout": dict(layout)})


def end(directory: Path, exit_code: int, reason: str, id: str = "") -> None:
    """Note how an attempt ended: ``id``, or that of this process, or the last that began.

    A disk that cannot take it must not hide the end itself.
    """
    about = {"exit_code": int(exit_code), "reason": redact(reason)}
    try:
        _append(directory, "end", id or os.environ.get(ATTEMPT) or _mine.get(directory, ""), about)
    except (OSError, ShardwiseError) as error:
        terminal.say(f"{directory / ATTEMPTS_FILE}: {error}", sys.stderr)


def _append(directory: Path, event: str, id: str, about: Mapping[str, Any]) -> None:
    file = JsonLines(directory / ATTEMPTS_FILE)  # moves damage aside
    known = read(directory)
    id = id or (known[-1].id if known else attempt_id())
    number = next((a.number for a in known if a.id == id), len(known) + 1)
    head = {"event": event, "attempt": number, "id": id, "time": round(time.time(), 3)}
    file.append({**head, **about, "steps": committed_steps(directory)})
    file.close()


def refused(exit_code: int, reason: str) -> None:
    """Of a rank of a rendered job that ended before it had its folder: say why, unless it is said.

    torchrun would lose it. ``exit.json`` stays: the folder may be another run's.
    """
    run, id = os.environ.get(RUN), os.environ.get(ATTEMPT)
    if run and id and not any(a.id == id and a.ended for a in read(Path(run))):
        end(Path(run), exit_code, reason, id)


def read(directory: Path) -> list[Attempt]:
    """All attempts, in the order in which they are first named. Raises DataError.

    Of an attempt that several told the end of (a rank, then its launcher), the last one counts.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in read_jsonl(path := directory / ATTEMPTS_FILE):
        if missing := _KEYS[line.get("event") == "start"] - line.keys():
            raise DataError(
                f"{path}: a line is no attempt's: it lacks {', '.join(sorted(missing))}"
            )
        known = found.setdefault(str(line["id"]), {"number": len(found) + 1, "id": line["id"]})
        if line["event"] == "start":
            same = ("scheduler", "job", "world", "layout")
            known |= {key: line[key] for key in same}
            known |= {"began": line["time"], "hosts": tuple(line["hosts"]), "start": line["steps"]}
        else:
            known |= {key: line[key] for key in ("exit_code", "reason")}
            known |= {"ended": line["time"], "reached": line["steps"]}
    return [Attempt(**fields) for fields in found.values()]
