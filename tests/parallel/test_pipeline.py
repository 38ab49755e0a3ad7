"""Where a pipeline is cut, and what a rank holds while it works."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwise.parallel import pipeline
from shardwise.parallel.layout import SINGLE, Layout
from shardwise.parallel.pipeline import chunks_of, homes, split_layers, split_model
from tests.support import toy
from tests.support.pool import RankPool

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

    found = split_layers(tuple(layers), first, last, parts)
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


class Doubling(pipeline.Work):
    """Every chunk doubles what it gets; notes what the executor holds meanwhile."""

    def __init__(self) -> None:
        self.executor: pipeline.Executor | None = None
        self.held: list[tuple[int, int, int]] = []

    def forward(self, chunk: int, microbatch: int, x: Tensor | None) -> Tensor:
        it = self.executor
        assert it is not None
        self.held.append((len(it.sent), len(it.outputs), len(it.inputs)))
        x = torch.ones(3, requires_grad=True) if x is None else x
        return (2.0 * x).sum() if chunk == it.last else 2.0 * x

    def boundary(self, microbatch: int) -> Tensor:
        return torch.empty(3)

    def after_backward(self, chunk: int) -> None:
        pass


def most_held(schedule: str, number: int, training: bool) -> tuple[int, ...]:
    """The most messages, outputs and inputs that a rank holds during a pass."""
    virtual = 1 if schedule in SINGLE else 2
    layout = Layout(pp=2, virtual=virtual, schedule=schedule)
    assert dist.group.WORLD is not None
    work = Doubling()
    work.executor = pipeline.Executor(layout, dist.group.WORLD, work)
    make = pipeline.program if training else pipeline.forward_program
    with torch.set_grad_enabled(training):
        work.executor.run(make(layout, number))
    it = work.executor
    assert not (it.sent or it.outputs or it.inputs or it.arriving or it.later or it.grads)
    return tuple(map(max, zip(*work.held, strict=True)))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "interleavedzb", "zbv"])
def test_nothing_adds_up_over_micro_batches(ranks: RankPool, schedule: str) -> None:
    for training in (True, False):
        few, many = (
            ranks.run(most_held, schedule, number, training, world=2) for number in (12, 24)
        )
        assert few == many
        if not training:
            assert max(map(max, many)) <= 4 and all(inputs == 0 for *_, inputs in many)
