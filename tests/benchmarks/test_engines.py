"""The race of engines: what it measures, and what it says of it."""

from __future__ import annotations

import pytest

import engines as bench


def figures(speed: float, memory: float, ratio: float) -> dict[str, object]:
    found = {"tokens_per_second": speed, "bytes": memory * 2**20, "ratio": ratio}
    return found | {"spread": 0.1, "profile": "where it went"}


def test_a_report_compares_with_the_first() -> None:
    text = bench.report({"native": figures(200, 90, 1.0), "deepspeed": figures(100, 100, 2.0)})
    assert "native / deepspeed: speed 2.00 (target 1.00: met)" in text
    assert "native / deepspeed: memory 0.90 (target 1.03: met)" in text
    assert "native / native" not in text and text.count("where it went") == 2


@pytest.mark.slow
def test_all_engines_start_from_one_loss() -> None:
    pytest.importorskip("deepspeed")
    found = bench.race(["native", "deepspeed"], bench.SHAPES["tiny"], 2, turns=2)
    assert all(f["tokens_per_second"] > 0 and f["bytes"] > 0 for f in found.values())
