"""Rows go to the ranks that need them, and to no other; all else are statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwise.losses.advantages import whiten
from shardwise.losses.gae import explained_variance
from shardwise.rewards import Problem
from shardwise.stages import row_holders
from shardwise.stages.groups import Group
from shardwise.stages.row_holders import Sums, move
from tests.stages.recipes import recipe, run
from tests.support.pool import RankPool

PROBLEM = Problem("1", "?", "!", {})
TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
LOGPROB = st.floats(max_value=0.0, allow_nan=False)


@st.composite
def groups(draw: Any) -> Group:
    tokens = draw(st.lists(TOKENS, min_size=1, max_size=4))
    words = st.lists(st.integers(0, 9), min_size=1, max_size=4)
    kept = draw(st.none() | st.just([[draw(words) for _ in t] for t in tokens]))
    return Group(
        problem=PROBLEM,
        prompt_id=7,
        prompt=draw(TOKENS),
        tokens=tokens,
        logprobs=[[draw(LOGPROB) for _ in t] for t in tokens],
        stopped=[draw(st.booleans()) for _ in tokens],
        texts=[str(t) for t in tokens],
        rewards=[draw(st.none() | st.floats(allow_nan=False)) for _ in tokens],
        reasons=["" for _ in tokens],
        policy="abc",
        kept=kept,
    )


@given(groups())
def test_a_row_arrives_as_it_left(group: Group) -> None:
    there = Group.told(PROBLEM, 7, group.statistics())
    assert not there.here and there.sizes == group.sizes
    there.unpack(group.packed(), str)
    assert there == group


def exchange(have: list[list[int]], need: list[list[int]]) -> tuple[dict[int, Any], int]:
    """In a rank: what it gets of rows that say their number, and how many it was sent."""
    received: list[Tensor] = []
    real = row_holders.all_to_all_parts

    def spied(parts: Any, *args: Any) -> list[Tensor]:
        found = real(parts, *args)
        received.extend(found)
        return found

    mine = {i: torch.full((i + 1,), float(i)) for i in have[dist.get_rank()]}
    with mock.patch.object(row_holders, "all_to_all_parts", spied):
        found = move(mine, have, need, torch.float32)
    numbers = sum(len(t) for t in received if t.dtype == torch.float32)
    return {i: v.tolist() for i, v in found.items()}, numbers


HOLDERS = st.lists(st.sets(st.integers(0, 5)), min_size=3, max_size=3)


@pytest.mark.parametrize("world", [1, 3])
def test_every_rank_gets_what_it_needs_and_has_not(ranks: RankPool, world: int) -> None:
    @given(HOLDERS, HOLDERS)
    def check(have: list[set[int]], need: list[set[int]]) -> None:
        have, need = have[:world], need[:world]
        have[0] |= set().union(*need)
        told = [[sorted(of_rank) for of_rank in some] for some in (have, need)]
        found = ranks.run(exchange, *told, world=world)
        for rank, (rows, numbers) in enumerate(found):
            missing = need[rank] - have[rank]
            assert rows == {i: [float(i)] * (i + 1) for i in missing}
            assert numbers == sum(i + 1 for i in missing), "nothing but that is sent"

    check()


def received(config: dict[str, Any], *overrides: str) -> list[dict[str, int]]:
    """In a rank: a stage is run; for each rollout, bytes of rows received, and of all rows."""
    from shardwise.stages.rollout_worker import RolloutWorker

    found: list[dict[str, int]] = []
    real, moved = RolloutWorker.rollout, row_holders.all_to_all_parts

    def spied(parts: Any, *args: Any) -> list[Tensor]:
        got = moved(parts, *args)
        found[-1]["received"] += sum(t.nbytes for t in got if t.dtype == torch.int32)
        return got

    def rollout(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append({"received": 0})
        groups = real(self, *args, **kwargs)
        found[-1] |= {"here": sum(g.here for g in groups), "rows": len(groups)}
        found[-1]["mine"] = sum(
            g.packed().nbytes for i, g in enumerate(groups)
            if g.here and i % dist.get_world_size() != dist.get_rank()
        )  # fmt: skip
        return groups

    with (
        mock.patch.object(RolloutWorker, "rollout", rollout),
        mock.patch.object(row_holders, "all_to_all_parts", spied),
    ):
        run(config, *overrides)
    return found


def test_a_data_rank_receives_the_rows_that_it_trains_on_alone(
    ranks: RankPool, tmp_path: Path
) -> None:
    config = recipe(tmp_path / "run", "grpo")
    options = ["stages.grpo.steps=1", "stages.grpo.keep_rollouts_every=0"]
    options += ["stages.grpo.sampling.top_k=5", "engine.layout=dp4.zero2"]
    options += ["stages.grpo.batch.global_batch=8", "stages.grpo.batch.micro_batch=1"]
    for rank, [rollout] in enumerate(ranks.run(received, config, *options, world=4)):
        assert (rollout["here"], rollout["rows"]) == (2, 8), rank
        assert rollout["received"] == rollout["mine"] > 0, rank


def sums(cut: Sequence[int], rows: list[list[float]]) -> tuple[float, ...]:
    """In a rank: statistics over rows of which it holds some."""
    world, rank = dist.get_world_size(), dist.get_rank()
    need = [
        {i for i, at in enumerate(cut) if rank_of in (at % world, 0)} for rank_of in range(world)
    ]
    held = Sums(need, rank)
    mine = [rows[i] for i in held.mine]
    width = max(map(len, rows))
    x_CT = torch.tensor([[*r, *[0.0] * (width - len(r))] for r in mine], dtype=torch.float64)
    x_CT = x_CT.reshape(len(mine), width)
    mask_CT = torch.tensor([[i < len(r) for i in range(width)] for r in mine]).reshape(x_CT.shape)

    def total(values_CT: Tensor) -> float:
        return held.of([v[m].numpy() for v, m in zip(values_CT, mask_CT, strict=True)])

    white_CT = whiten(x_CT, mask_CT, total=total)
    explained = explained_variance(x_CT, 2 * x_CT + mask_CT, mask_CT, total)
    return total(x_CT), total(white_CT.square()), total(mask_CT.double()), explained


def test_sums_are_the_same_to_the_bit_on_any_number_of_ranks(ranks: RankPool) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=n).tolist() for n in (5, 1, 9, 30, 2, 17)]
    cut = [0, 1, 2, 1, 1, 0]
    [one] = ranks.run(sums, cut, rows, world=1)
    assert all(found == one for found in ranks.run(sums, cut, rows, world=3))
    flat = np.concatenate(rows)
    assert one[0] == pytest.approx(flat.sum()) and one[2] == len(flat)
    assert one[1] == pytest.approx(len(flat)) and one[3] == pytest.approx(0.75)
    assert not any(map(math.isnan, one))
