"""The race between two revisions: its interval, and a toy race of this one with itself."""

from __future__ import annotations

import math
import random

import pytest
import versions as bench


def test_interval_holds_the_truth_and_nothing_far_from_it() -> None:
    rng = random.Random(0)
    pairs = [0.9 * math.exp(rng.gauss(0, 0.02)) for _ in range(12)]
    mean, low, high = bench.interval(pairs)
    assert 0.88 < low < mean < high < 0.92
    assert low < 0.9 < high
    assert bench.interval([1.0] * 10) == (1.0, 1.0, 1.0)


@pytest.mark.slow
def test_a_toy_race_of_one_revision_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    if not (bench.ROOT / ".git").exists():
        pytest.skip("the tree is no git checkout")
    found = bench.main(["HEAD", "--only", "rollout", "--pairs", "2", "--threads", "1", "--tiny"])
    assert found["rollout"]["pairs"] == 2 and found["rollout"]["low"] > 0
    assert "s a step before" in capsys.readouterr().out
