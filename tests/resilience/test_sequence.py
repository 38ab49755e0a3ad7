"""Whoever leaves a collective out is named by the sequence numbers alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from shardwise.resilience.sequence import Call, Collectives, divergence
from tests.support.pool import RankPool

OPERATIONS = ("all_reduce", "all_gather", "broadcast", "barrier")
STEP = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(1, 9)), min_size=2, max_size=6, unique=True
)


def history(world: int, made: list[tuple[str, int]]) -> list[Call]:
    group = tuple(range(world))
    return [Call(group, i + 1, o, (n,), "torch.float32") for i, (o, n) in enumerate(made)]


@given(st.integers(2, 5), STEP, st.integers(2, 4), st.data())
def test_the_rank_that_left_one_out_is_named(
    world: int, step: list[tuple[str, int]], steps: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(step) - 1))
    culprit = data.draw(st.integers(0, world - 1))
    before = step * steps + step[:at]
    histories = {rank: history(world, [*before, step[at]]) for rank in range(world)}
    histories[culprit] = history(world, [*before, step[(at + 1) % len(step)]])
    found = divergence(histories)
    assert found is not None and found[0] == culprit
    assert f"rank {culprit} left a collective out" in found[1]
    assert f"collective {len(before) + 1}, {step[at][0]} of float32[{step[at][1]}]" in found[1]


@given(st.integers(2, 5), STEP, st.integers(1, 4), st.data())
def test_a_rank_that_came_less_far_is_named(
    world: int, step: list[tuple[str, int]], steps: int, data: st.DataObject
) -> None:
    culprit = data.draw(st.integers(0, world - 1))
    histories = {rank: history(world, step * steps) for rank in range(world)}
    assert divergence(histories) is None
    histories[culprit].pop()
    found = divergence(histories)
    assert found is not None and found[0] == culprit


@given(st.integers(2, 5), STEP, st.data())
def test_groups_of_the_same_ranks_are_told_apart(
    world: int, step: list[tuple[str, int]], data: st.DataObject
) -> None:
    """Where a saver's own group falls between the other calls differs by rank."""
    histories = {}
    for rank in range(world):
        histories[rank] = history(world, step)
        at = data.draw(st.integers(0, len(step)))
        histories[rank].insert(at, Call(tuple(range(world)), 1, "all_gather", (0,), "", "saver"))
    assert divergence(histories) is None
    histories[0].pop(-1 if histories[0][-1].name == "" else -2)
    found = divergence(histories)
    assert found is not None and found[0] == 0


def counted() -> list[tuple[int, str, tuple[int, ...]]]:
    with Collectives().watched() as collectives:
        value = torch.ones(3)
        dist.all_reduce(value)
        out = [torch.empty(3) for _ in range(dist.get_world_size())]
        dist.all_gather(out, value)
        dist.barrier()
        dist.barrier(dist.new_group())  # of the same ranks
        assert not collectives.waits
    dist.barrier()  # no longer counted
    return [(c.number, c.operation, c.shape) for _, c in collectives.calls]


def test_torchs_own_calls_are_counted(ranks: RankPool) -> None:
    expected = [
        (1, "all_reduce", (3,)),
        (2, "all_gather", (3,)),
        (3, "barrier", ()),
        (1, "barrier", ()),
    ]
    assert ranks.run(counted, world=2) == [expected] * 2
