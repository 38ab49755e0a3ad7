"""The GPU smoke test, dry on CPU: alone, under torchrun, and with faults that it must find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from benchmarks.gpu import smoke

from tests.support.pool import RankPool

SCRIPT = Path(smoke.__file__)
DRY = ["--device", "cpu", "--dry-run"]


def run(command: list[str]) -> tuple[int, dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert "{" in done.stdout, done.stderr[-3000:]
    if done.returncode:
        print(done.stderr[-3000:])
    return done.returncode, json.loads(done.stdout[done.stdout.index("{") :])


def test_plain_python_compiled() -> None:
    code, result = run([sys.executable, str(SCRIPT), *DRY])
    assert (code, result["ok"], result["failures"]) == (0, True, [])
    assert result["world_size"] == 1 and result["compiled"] and result["resume_bitwise"]
    assert result["devices"][0].startswith("cpu") and result["mfu"] is None
    assert set(result["losses"]) == {"zero1", "zero2", "zero3"}


def test_torchrun() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    code, result = run([*torchrun, "--nproc-per-node", "2", str(SCRIPT), *DRY, "--no-compile"])
    assert (code, result["failures"]) == (0, [])
    assert result["world_size"] == 2 and result["resume_bitwise"]


def broken(what: str, folder: str) -> list[str]:
    """The failures of one check on a rank where something is wrong."""

    def wrong_sum(tensor: Any, *_: Any, **__: Any) -> None:
        tensor.add_(1)

    faults = {
        "all_reduce": mock.patch.object(smoke.dist, "all_reduce", wrong_sum),
        "resume": mock.patch.object(
            smoke.checkpoint, "load", lambda *_: {"engine": {"updates": 2}}
        ),
    }
    with faults[what]:
        it = smoke.Smoke(smoke.TINY, torch.device("cpu"), compile=False, folder=Path(folder))
        getattr(it, what)()
    return it.failures


@pytest.mark.parametrize(
    "what,message", [("all_reduce", "all_reduce of"), ("resume", "after the resume")]
)
def test_faults_are_found(ranks: RankPool, tmp_path: Path, what: str, message: str) -> None:
    [failures] = ranks.run(broken, what, str(tmp_path), world=1)
    assert any(message in f for f in failures)


@pytest.mark.parametrize(
    "curves,number",
    [
        ({"a": [2.0, 1.0], "b": [2.0, 1.01]}, 0),
        ({"a": [2.0, 1.0], "b": [2.0, 1.1]}, 1),
        ({"a": [2.0, 2.0], "b": [2.0, 2.0]}, 2),
        ({"a": [2.0, 1.0], "b": [2.0, float("nan")]}, 1),
    ],
)
def test_curve_failures(curves: dict[str, list[float]], number: int) -> None:
    assert len(smoke.curve_failures(curves)) == number
