"""Real training in a trial: killed with all it started, a sweep ends like one that was not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from shardwise.sweep.api import sweep
from tests.stages.recipes import TIMES
from tests.sweep.conftest import LR, Write, in_a_fork, until


def lines(folder: Path) -> list[dict[str, object]]:
    """What a trial has logged, without times."""
    return [
        {k: v for k, v in json.loads(line).items() if not any(t in k for t in TIMES)}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_a_killed_sweep_ends_bitwise_like_an_unbroken_one(write: Write, tmp_path: Path) -> None:
    search = {LR: [1e-2]}
    steps = {"stages.pretrain.steps": 24, "stages.pretrain.checkpoint.every": 4}
    path = write(search, overrides=steps)
    metrics = tmp_path / "sweep/trials/0000/metrics.jsonl"
    pid = in_a_fork(path)
    until(lambda: any(metrics.parent.glob("stages/pretrain/checkpoints/step_*")), 120)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not (metrics.parent / "exit.json").exists()
    found = sweep(path)
    assert found["trials"] == {"done": 1} and found["objective"]["metric"] == "val_loss"
    notes = (metrics.parent / "notes.jsonl").read_text()
    assert notes.count('"started"') == 2
    whole = sweep(write(search, overrides=steps, sweep_dir=str(tmp_path / "whole")))
    assert lines(metrics.parent) == lines(tmp_path / "whole/trials/0000")
    assert found["best"]["value"] == whole["best"]["value"]
