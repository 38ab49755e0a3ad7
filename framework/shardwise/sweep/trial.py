"""One trial: its folder, what it says it is, and how it stands."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from shardwise import safe_files
from shardwise.errors import DataError, ExitCode, exit_code_of_signal
from shardwise.resilience.ending import EXIT_FILE, clear_ending
from shardwise.resilience.stop import SIGNALS
from shardwise.storage.durable import write_durably
from shardwise.sweep.config import Point

TRIALS, TRIAL_FILE, PRUNED_FILE, LOG_FILE = "trials", "trial.json", "pruned.json", "trial.log"
# open: it will be run, from its last checkpoint if it has one.
Status = Literal["open", "done", "pruned", "failed"]
# Ends of a run that was stopped, saved or not: none of them is the trial's fault.
STOPPED = {
    int(ExitCode.REQUEUE),
    *(exit_code_of_signal(number) for number in (signal.SIGINT, *SIGNALS)),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """``number``: of the point; ``repeat``: which run of it, from 0. ``ranks``: processes.

    ``overrides``: all that it says over the recipe, dotted key to value.
    """

    folder: Path
    number: int
    repeat: int
    point: Point
    overrides: dict[str, Any]
    ranks: int

    @property
    def name(self) -> str:
        """That of its folder."""
        return name_of(self.number, self.repeat)

    @property
    def order(self) -> tuple[int, int]:
        """All points once, then all of them again."""
        return self.repeat, self.number

    @property
    def begun(self) -> bool:
        """Whether it has been started, ever."""
        return (self.folder / TRIAL_FILE).exists()

    def write(self) -> None:
        """Say what it is, on disk, before it starts."""
        record = {
            "number": self.number,
            "repeat": self.repeat,
            "point": self.point,
            "overrides": self.overrides,
            "ranks": self.ranks,
        }
        text = json.dumps(record, indent=1, ensure_ascii=False)
        write_durably(self.folder / TRIAL_FILE, text.encode())

    def status(self) -> tuple[Status, str]:
        """How it stands, and the reason: its root cause, or why it was pruned."""
        ended = _record(self.folder / EXIT_FILE)
        code = None if ended is None else ended.get("exit_code")
        if code == ExitCode.DONE:
            return "done", ""
        if (pruned := _record(self.folder / PRUNED_FILE)) is not None:
            return "pruned", str(pruned.get("reason", ""))
        if ended is None or code in STOPPED:
            return "open", ""
        return "failed", str(ended.get("reason", ""))

    def reopen(self) -> None:
        """A failed trial is to be run again."""
        clear_ending(self.folder)

    def prune(self, step: int, value: float, reason: str) -> None:
        """Write that it is to stop, before it is told: a sweep that dies between does not go on."""
        record = {"step": step, "value": value, "reason": reason}
        write_durably(self.folder / PRUNED_FILE, json.dumps(record).encode())


def name_of(number: int, repeat: int) -> str:
    """``0007``, and ``0007-r1`` for the second run of the point."""
    return f"{number:04d}" + (f"-r{repeat}" if repeat else "")


def override_words(overrides: Mapping[str, Any]) -> list[str]:
    """``key=value``, values as JSON, which is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]


def read_trials(directory: Path) -> list[Trial]:
    """Every trial of a sweep by number and repeat; a folder that does not say what it is, is none.

    Raises DataError for a damaged trial.json.
    """
    found = []
    root = directory / TRIALS
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        record = _record(folder / TRIAL_FILE, strict=True)
        if record is None:
            continue
        try:
            trial = Trial(
                folder, int(record["number"]), int(record["repeat"]), dict(record["point"]),
                dict(record["overrides"]), int(record["ranks"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(folder / TRIAL_FILE, f"{error!r}") from error
        if trial.name != folder.name:
            raise _damaged(folder / TRIAL_FILE, f"it says {trial.name}")
        found.append(trial)
    return sorted(found, key=lambda trial: (trial.number, trial.repeat))


def last_line(path: Path, most: int = 4000) -> str:
    """The last line with words in a log; empty where there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - most))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _record(path: Path, strict: bool = False) -> dict[str, Any] | None:
    try:
        record = safe_files.parse_json(safe_files.read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:  # DataError too
        if strict:
            raise _damaged(path, str(error)) from error
        return {}
    return record if isinstance(record, dict) else {}


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: is damaged ({why}); delete the trial's folder to run it afresh")
