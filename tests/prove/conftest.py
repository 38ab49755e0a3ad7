"""The quickstart's run, which both proofs start from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardwise.launch.train import train

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's directory; ``QUICKSTART_RUN`` may name one that `make demo` has finished."""
    if named := os.environ.get("QUICKSTART_RUN"):
        assert Path(named, "summary.json").exists(), f"{named} is no finished run"
        return Path(named).resolve()
    run_dir = tmp_path_factory.mktemp("quickstart")
    train(RECIPE, [f"run_dir={run_dir}"], nproc=2)
    return run_dir
