"""Mixtures: a pure function of position that keeps to its weights at every prefix."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.data.mixture import MixtureSampler, Schedule
from shardwise.errors import UserError

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


@given(WEIGHTS, st.integers(1, 400))
def test_weights_hold_at_every_prefix(weights: list[float], n: int) -> None:
    schedule = Schedule(weights)
    share = np.array(weights) / np.sum(weights)
    bound = math.ceil(math.log2(len(weights))) / 2 + 1e-9
    counts = np.zeros(len(weights))
    for position in range(n):
        source, inner = schedule.at(position)
        assert inner == counts[source]  # its own position is the number of its earlier draws
        counts[source] += 1
        assert np.abs(counts - share * (position + 1)).max() <= bound


def test_no_replay_needed_far_out() -> None:
    """Positions of 1e12 cost one walk, and the count there is still within the bound."""
    weights, position = [0.7, 0.2, 0.1], 10**12
    schedule = Schedule(weights)
    seen = set()
    for p in range(position, position + 30):
        source, inner = schedule.at(p)
        seen.add(source)
        assert abs(inner - weights[source] * p) < 3
    assert seen == {0, 1, 2}


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 5)), min_size=1, max_size=5),
    st.integers(0, 500),
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
)
def test_any_split_draws_the_same(
    sources: list[tuple[int, float]], start: int, sizes: list[int]
) -> None:
    counts, weights = [n for n, _ in sources], [w for _, w in sources]
    mixed = MixtureSampler(counts, weights, seed=1)
    parts, position = [], start
    for size in sizes:
        parts += MixtureSampler(counts, weights, seed=1).batch(position, size).tolist()
        position += size
    assert parts == mixed.batch(start, position - start).tolist()


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0.2, 5)), min_size=2, max_size=4))
def test_each_source_runs_through_its_own_epochs(sources: list[tuple[int, float]]) -> None:
    counts, weights = [n for n, _ in sources], [w for _, w in sources]
    drawn = MixtureSampler(counts, weights, seed=2).batch(0, 400)
    offset = 0
    for n in counts:
        own = drawn[(drawn >= offset) & (drawn < offset + n)] - offset
        for epoch in range(len(own) // n):
            assert sorted(own[epoch * n : (epoch + 1) * n]) == list(range(n))
        offset += n


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights"):
        Schedule(weights)
