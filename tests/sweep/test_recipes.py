"""The sweeps in configs/ are ones that this machine could run."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from shardwise.sweep.config import load_sweep
from shardwise.sweep.plan import make_plan

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_trial_of_a_sweep_can_run(path: Path, tmp_path: Path) -> None:
    with contextlib.chdir(ROOT):
        config = load_sweep(path).model_copy(update={"sweep_dir": tmp_path / "sweep"})
        plan = make_plan(config)
    assert config.name == path.stem and not plan.impossible and len(plan.trials) >= 12
    assert max(trial.ranks for trial in plan.trials) <= 4
