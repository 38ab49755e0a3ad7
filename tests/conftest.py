"""Shared fixtures: the rank pool, and one thread per process so that results are reproducible."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from tests.support.pool import RankPool

torch.set_num_threads(1)
# A busy machine may take its time over an example.
settings.register_profile("shardwise", deadline=None)
settings.load_profile("shardwise")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With two workers, a file stays on one; `tests/verify`, many ranks at a time, starts first.

    Two worlds of eight ranks at once would wait for each other's turns on two cores.
    """
    here = Path(__file__).parent

    def group(item: pytest.Item) -> str:
        path = item.path.relative_to(here)
        return "verify" if path.parts[0] == "verify" else str(path)

    items.sort(key=lambda item: group(item) != "verify")
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks.run(fn, *args, world=2)``: see tests/support/pool.py."""
    pool = RankPool()
    yield pool
    pool.close()
