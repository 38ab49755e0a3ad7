"""Trials as tasks of a Slurm array: rendered by `launch`, handed over once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import ConfigError, UserError
from shardwise.sweep.api import submit_array, tables
from shardwise.sweep.trial import read_trials
from tests.sweep.conftest import LR, Write


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    given = {"shared": str(tmp_path), "workdir": str(tmp_path), "cpu_ranks": 2}
    path.write_text(json.dumps({**given, "slurm": {"partition": "cpu"}}))
    return path


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake that keeps what it is given; returns the file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch",):
        (folder / name).write_text(f"#!/bin/sh\ncat > {tmp_path}/job.sh\necho 17\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "job.sh"


def tasks_of(script: str) -> list[str]:
    return [line for line in script.splitlines() if ") run=" in line]


def test_a_dry_run_prints_the_array_and_writes_nothing(
    write: Write, profile: Path, tmp_path: Path
) -> None:
    found = submit_array(write(), profile, at_once=2, dry_run=True)
    assert "#SBATCH --array=0-2%2" in found["submitted"]
    tasks = tasks_of(found["submitted"])
    assert len(tasks) == 3 and f"run={tmp_path}/sweep/trials/0001;" in tasks[1]
    assert f"{LR}=0.01" in tasks[1]
    assert not (tmp_path / "sweep").exists()
    done = subprocess.run(["sh", "-n"], input=found["submitted"], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_trials_are_handed_over_once(
    write: Write, profile: Path, sbatch: Path, tmp_path: Path
) -> None:
    assert submit_array(write(), profile)["job"] == "17"
    assert len(tasks_of(sbatch.read_text())) == 3
    assert [t.ranks for t in read_trials(tmp_path / "sweep")] == [2, 2, 2]
    with pytest.raises(UserError, match="every trial was handed over"):
        submit_array(write(), profile)
    more = submit_array(write({LR: [1e-3, 1e-2, 1e-1, 1.0]}), profile)
    assert more["trials"] == ["0003"]
    again = submit_array(write({LR: [1e-3, 1e-2, 1e-1, 1.0]}), profile, retry_failed=True)
    assert again["trials"] == ["0000", "0001", "0002", "0003"]
    assert tables(write({LR: [1e-3, 1e-2, 1e-1, 1.0]}))["trials"] == {"waiting": 4}


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ({"method": {"kind": "optuna", "trials": 2}}, "method.kind: optuna"),
        ({"pruner": "median"}, "pruner: needs the sweep"),
        ({"budget": {"hours": 1.0}}, "budget.hours"),
        ({"search": {"engine.layout": ["tp2", "zero1.tp4"]}}, "0001.*needs 4 ranks but 2"),
    ],
)
def test_what_an_array_cannot_do_is_refused(
    write: Write, profile: Path, rest: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        submit_array(write(rest.pop("search", None), **rest), profile, dry_run=True)
