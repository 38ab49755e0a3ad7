"""Where a pipeline is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.parallel.layout import Layout
from shardwise.parallel.pipeline import chunks_of, homes, split_layers, split_model
from tests.support import toy

costs = st.lists(st.floats(0.5, 4.0), min_size=1, max_size=7)


@given(costs, st.floats(0, 5), st.floats(0, 5), st.data())
def test_the_dearest_part_is_as_cheap_as_can_be(
    layers: list[float], first: float, last: float, data: st.DataObject
) -> None:
    parts = data.draw(st.integers(1, len(layers)))

    def dearest(ranges: list[range]) -> float:
        prices = [sum(layers[i] for i in r) for r in ranges]
        prices[0] += first
        prices[-1] += last
        return max(prices)

    found = split_layers(layers, first, last, parts)
    assert [i for r in found for i in r] == list(range(len(layers)))
    assert all(len(r) > 0 for r in found) and len(found) == parts
    cuts = itertools.combinations(range(1, len(layers)), parts - 1)
    every = [[range(a, b) for a, b in zip((0, *c), (*c, len(layers)))] for c in cuts]
    assert dearest(found) == pytest.approx(min(map(dearest, every)))


def test_a_heavy_head_takes_layers_from_its_part() -> None:
    small = split_model(toy.llama(num_layers=8, vocab_size=64), 2)
    large = split_model(toy.llama(num_layers=8, vocab_size=4096), 2)
    assert [len(r) for r in small] == [4, 4]
    assert len(large[1]) < len(large[0])


def test_parts_lie_in_a_loop_or_in_a_v() -> None:
    loop = Layout(pp=3, virtual=2, schedule="interleaved")
    v = Layout(pp=3, virtual=2, schedule="zbv")
    assert [chunks_of(loop, r) for r in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [chunks_of(v, r) for r in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert homes(v) == {0: 0, 5: 0, 1: 1, 4: 1, 2: 2, 3: 2}
