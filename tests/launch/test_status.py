"""What `launch status` makes of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise import checkpoint
from shardwise.launch.status import Status, status
from shardwise.resilience import attempts
from shardwise.storage.lock import RunLock
from tests.cli.conftest import Command, shardwise  # noqa: F401  # a fixture


def write(
    run: Path, *, ends: list[int | None], saved: int = 20, logged: int = 30, every: int = 1
) -> None:
    """A run of 1 s a step; an attempt a turn, each of 40 s, 60 s between their starts."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("name: x\nstages: [{kind: sft, name: sft, steps: 60}]\n")
    checkpoint.save(run / "stages" / "sft" / "checkpoints", saved, {"w": torch.zeros(1)}, {})
    lines = [
        {"time": 10.0 + step, "stage": "sft", "step": step, "kind": "train", "step_seconds": 1.0}
        for step in range(every, logged + 1, every)
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    records: list[dict[str, Any]] = []
    for number, code in enumerate(ends, 1):
        head = {"attempt": number, "id": f"slurm.7.{number}", "steps": {"sft": 10 * number}}
        about = {"scheduler": "slurm", "job": "7", "hosts": ["a", "b"], "world": 16, "layout": {}}
        records.append({"event": "start", "time": 60.0 * number, **head, **about})
        if code is not None:
            end = {"event": "end", "time": 60.0 * number + 40.0, "exit_code": code, "reason": "so"}
            records.append({**head, **end})
    text = "".join(f"{json.dumps(record)}\n" for record in records)
    (run / attempts.ATTEMPTS_FILE).write_text(text)


def of(run: Path, **how: Any) -> Status:
    write(run, **how)
    return status(run)


def test_goodput_counts_steps_that_count(tmp_path: Path) -> None:
    """Two attempts from 60 s to 160 s."""
    done = of(tmp_path, ends=[85, 0])
    assert (done.state, done.wall_seconds, done.step_seconds, done.goodput) == (
        "done", 100.0, 30.0, 0.3,
    )  # fmt: skip
    stopped = of(tmp_path, ends=[85, 1])  # ten steps are not saved: they come again
    assert (stopped.state, stopped.step_seconds, stopped.goodput) == ("stopped", 20.0, 0.2)
    futile = of(tmp_path / "futile", ends=[85, 1], logged=19, saved=0)
    assert (futile.step_seconds, futile.goodput) == (0.0, 0.0)
    sparse = of(tmp_path, ends=[85, 0], every=5)
    assert sparse.step_seconds == 30.0
    [stage] = done.stages
    assert (stage.name, stage.logged, stage.committed, stage.steps) == ("sft", 30, 20, 60)


def test_a_run_that_lives_and_one_that_was_killed(tmp_path: Path) -> None:
    write(tmp_path, ends=[85, None])
    with RunLock(tmp_path):
        living = status(tmp_path)
        assert (living.state, living.step_seconds) == ("running", 30.0)
    killed = status(tmp_path)
    assert (killed.state, killed.step_seconds) == ("lost", 20.0)


def test_the_command_prints_and_writes_json(
    tmp_path: Path, shardwise: Command  # noqa: F811
) -> None:  # fmt: skip
    write(tmp_path, ends=[85, 3])
    code, out, _ = shardwise("launch", "status", tmp_path)
    assert code == 0 and "goodput: 20.0 %" in out and "ended with 3: so" in out
    assert "16 ranks on a, b" in out and "step 30 of 60, saved 20" in out
    code, out, _ = shardwise("launch", "status", tmp_path, "--json", "-")
    found = json.loads(out)
    assert found["goodput"] == 0.2 and [a["exit_code"] for a in found["attempts"]] == [85, 3]


@pytest.mark.parametrize("folder", ["nothing", "."])
def test_no_run_is_refused(tmp_path: Path, shardwise: Command, folder: str) -> None:  # noqa: F811
    code, _, err = shardwise("launch", "status", tmp_path / folder)
    assert code == 2 and "is not a run" in err
