"""A recipe, sweeps over it, and trials that are fakes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import Stopped
from shardwise.sweep.api import sweep
from shardwise.sweep.config import SweepConfig, load_sweep
from shardwise.sweep.trial import Trial
from tests.stages.recipes import recipe

FAKE = Path(__file__).with_name("fake_trial.py")
LR = "stages.pretrain.optimizer.lr"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(search, **rest)``: a sweep's YAML over a tiny recipe, in ``tmp_path``."""
    small = recipe(tmp_path / "unused", "pretrain")
    del small["run_dir"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(small))

    def to_file(search: dict[str, Any] | None = None, **rest: Any) -> Path:
        data = {"recipe": str(tmp_path / "recipe.yaml"), "sweep_dir": str(tmp_path / "sweep")}
        data |= {"search": {LR: [1e-3, 1e-2, 1e-1]} if search is None else search, **rest}
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps(data))
        return path

    return to_file


@pytest.fixture
def load(write: Write) -> Callable[..., SweepConfig]:
    """The same, read."""
    return lambda search=None, **rest: load_sweep(write(search, **rest))


def fake_command(recipe: Path, trial: Trial) -> Sequence[str]:
    """In place of `command_of`."""
    return [sys.executable, "-S", str(FAKE), str(trial.folder), json.dumps(trial.point)]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trials are fakes; ``fakes(steps=..., seconds=...)`` says how long they take."""
    monkeypatch.setattr("shardwise.sweep.run.command_of", fake_command)

    def take(steps: int = 4, seconds: float = 0.0) -> None:
        monkeypatch.setenv("FAKE_STEPS", str(steps))
        monkeypatch.setenv("FAKE_SECONDS", str(seconds))

    take()
    monkeypatch.setattr("shardwise.sweep.run.POLL_SECONDS", 0.02)
    monkeypatch.setattr("shardwise.sweep.run.WATCH_SECONDS", 0.02)
    return take


def starts(folder: Path) -> list[dict[str, Any]]:
    """What fakes have noted, in order."""
    path = folder / "starts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def in_a_fork(path: Path) -> int:
    """A sweep in a process of its own; its exit code is the sweep's."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sweep(path)
        code = 0
    except Stopped as error:
        code = error.exit_code
    finally:
        os._exit(code)


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


CORES = sorted(os.sched_getaffinity(0))
