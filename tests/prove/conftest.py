"""The quickstart's run, which both proofs start from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardwise.launch.train import train

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's directory. ``QUICKSTART_RUN`` may name one of ``make demo``; it goes on from where
    that stopped, so a finished one costs nothing."""
    named = os.environ.get("QUICKSTART_RUN")
    run_dir = Path(named).resolve() if named else tmp_path_factory.mktemp("quickstart")
    train(RECIPE, [f"run_dir={run_dir}"], nproc=2)
    return run_dir
