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

from tests.support.hub import HubCache
from tests.support.pool import RankPool

torch.set_num_threads(1)
# A busy machine may take its time over an example.
settings.register_profile("shardwise", deadline=None)
settings.load_profile("shardwise")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks.run(fn, *args, world=2)``: see tests/support/pool.py."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubCache]:
    """An empty cache of the Hugging Face hub, and no network."""
    from huggingface_hub import constants

    from shardwise import hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._snapshot.cache_clear()
    yield HubCache(tmp_path / "hub")
    hub._snapshot.cache_clear()
