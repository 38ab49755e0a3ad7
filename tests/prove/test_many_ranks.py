"""Layouts of 16 and of 64 ranks, on small models, with ranks that take turns on two cores."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwise.verify.run import verify
from tests.stages.recipes import recipe
from tests.support.pool import RankPool

pytestmark = pytest.mark.slow

MOST_BYTES = 12 << 30
LAYOUTS = ("dp2.zero3.tp2.sp.pp2.cp2", "dp4.zero3.tp4.sp.pp2.cp2", "dp8.zero1.tp2.pp4.zbv")


@pytest.fixture
def own() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


def proportional_bytes() -> int:
    """What this process holds, and its part of what it shares."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_many_ranks(
    layout: str, own: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    config["model"] |= {"hidden_size": 64, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4}
    config["stages"][0]["batch"]["global_batch"] = 64
    began = time.monotonic()
    report = verify(config, [layout], pool=own)
    seconds = time.monotonic() - began
    world = max(own.worlds)
    memory = sum(own.run(proportional_bytes, world=world))
    with capsys.disabled():
        print(f"\n{layout}: {world} ranks, {seconds:.0f} s, {memory / 2**30:.1f} GiB")
    assert report.passed and not report.refused
    assert memory < MOST_BYTES
