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

from tests.stages.recipes import recipe
from tests.support.pool import RankPool

SCRIPT = Path(smoke.__file__)
DRY = ["--device", "cpu", "--dry-run"]


@pytest.fixture
def dry(tmp_path: Path) -> list[str]:
    """Options of a dry run, with a small recipe to verify."""
    small = recipe(tmp_path / "run", "pretrain")
    (tmp_path / "recipe.yaml").write_text(json.dumps(small))
    return [*DRY, "--recipe", str(tmp_path / "recipe.yaml")]


def run(command: list[str]) -> tuple[int, dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert "{" in done.stdout, done.stderr[-3000:]
    if done.returncode:
        print(done.stderr[-3000:])
    return done.returncode, json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.slow  # `test_torchrun` is the same, not compiled
def test_plain_python_compiled(dry: list[str]) -> None:
    code, result = run([sys.executable, str(SCRIPT), *dry])
    assert (code, result["ok"], result["failures"]) == (0, True, [])
    assert result["world_size"] == 1 and result["compiled"] and result["resume_bitwise"]
    assert result["devices"][0].startswith("cpu") and result["mfu"] is None
    assert [line.split()[:2] for line in result["verify"]["table"][1:2]] == [
        ["pretrain", "dp1.zero0"]
    ]
    assert set(result["losses"]) == {"zero1", "zero2", "zero3"}


@pytest.mark.slow
def test_torchrun(dry: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    code, result = run([*torchrun, "--nproc-per-node", "2", str(SCRIPT), *dry, "--no-compile"])
    assert (code, result["failures"]) == (0, [])
    for layout in smoke.layouts_for(2)[:2]:
        assert any(f" {layout} " in line for line in result["verify"]["table"]), layout
    assert result["world_size"] == 2 and result["resume_bitwise"]


@pytest.mark.slow
def test_a_recipe_that_cannot_be_verified_fails_the_run(tmp_path: Path) -> None:
    found = smoke.verify(tmp_path / "none.yaml", "cpu", ["dp1"], 120.0)
    assert not found["passed"] and "none.yaml" in "\n".join(found["table"])
    slow = smoke.verify(tmp_path / "none.yaml", "cpu", ["dp1"], 0.05)
    assert not slow["passed"] and slow["exit_code"] == "ended after 0.05 s"


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
