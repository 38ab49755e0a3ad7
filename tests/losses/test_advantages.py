"""Advantages against Python's own statistics, one group at a time."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.losses.advantages import group_advantages, rewards_tensor, whiten

rewards = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 0.1]), st.floats(-5, 5, width=32))
groups = st.lists(st.lists(rewards, min_size=1, max_size=6), min_size=1, max_size=5)


def naive(kind: str, group: list[float | None], eps: float) -> list[float]:
    known = [r for r in group if r is not None]
    if len(set(known)) <= 1:
        return [0.0] * len(group)
    mean = statistics.fmean(known)
    result = []
    for r in group:
        if r is None:
            result.append(0.0)
        elif kind == "rloo":
            result.append(r - (sum(known) - r) / (len(known) - 1))
        elif kind == "group":
            result.append(r - mean)
        else:
            result.append((r - mean) / (statistics.stdev(known) + eps))
    return result


@pytest.mark.parametrize("kind", ["group_std", "group", "rloo"])
@given(groups)
def test_groups_against_the_papers(kind: str, values: list[list[float | None]]) -> None:
    got = group_advantages(kind, rewards_tensor(values), eps=1e-4)  # type: ignore[arg-type]
    for i, group in enumerate(values):
        known = [r for r in group if r is not None]
        expected = naive(kind, group, 1e-4)
        assert got.advantages_GN[i, : len(group)].tolist() == pytest.approx(
            expected, rel=1e-9, abs=1e-9
        )
        assert not got.advantages_GN[i, len(group) :].any()
        assert got.scorable_GN[i].sum() == len(known)
        assert bool(got.degenerate_G[i]) == (len(set(known)) == 1)
        if got.degenerate_G[i]:
            assert not got.advantages_GN[i].any()  # exactly zero, not nearly


def test_counts_and_a_group_whose_mean_rounds() -> None:
    """Seven rewards of 0.1 have a mean that is not 0.1; their advantages are 0 all the same."""
    result = group_advantages(
        "group_std", rewards_tensor([[0.1] * 7, [None] * 7, [1.0, None] * 3]), eps=1e-12
    )
    tenths = torch.full((7,), 0.1, dtype=torch.float64)
    assert float(tenths.sum() / 7) != 0.1
    assert not result.advantages_GN.any()
    assert result.degenerate_G.tolist() == [True, False, True]
    assert (result.num_degenerate, result.num_unscorable) == (2, 11)


def test_a_tiny_but_real_difference_is_not_degenerate() -> None:
    result = group_advantages("group_std", rewards_tensor([[1.0, 1.0 + 1e-12]]), eps=0.0)
    assert result.num_degenerate == 0
    assert result.advantages_GN.abs().tolist()[0] == pytest.approx([math.sqrt(0.5)] * 2)


def test_infinite_rewards_count_as_unscorable() -> None:
    result = group_advantages("group", torch.tensor([[float("inf"), 1.0, 3.0]]))
    assert result.advantages_GN.tolist() == [[0.0, -1.0, 1.0]]
    assert result.num_unscorable == 1


def test_reinforce_pp_whitens_over_the_whole_batch() -> None:
    values = [[1.0, 2.0, None], [4.0, 4.0, 9.0]]
    known = [1.0, 2.0, 4.0, 4.0, 9.0]
    mean, variance = statistics.fmean(known), statistics.pvariance(known)
    got = group_advantages("reinforce_pp", rewards_tensor(values)).advantages_GN
    expected = [
        0.0 if r is None else (r - mean) / math.sqrt(variance + 1e-8)
        for r in itertools.chain(*values)
    ]
    assert got.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown advantage"):
        group_advantages("x", torch.zeros(1, 2))  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=1, max_size=12))
def test_whitening_ignores_what_is_masked(pairs: list[tuple[float, bool]]) -> None:
    mask = torch.tensor([m for _, m in pairs])
    x = torch.tensor([v if m else float("nan") for v, m in pairs], dtype=torch.float64)
    known = [v for v, m in pairs if m]
    white, kept = whiten(x, mask), whiten(x, mask, shift_mean=False)
    assert not white[~mask].any() and not kept[~mask].any()
    if not known:
        return
    mean = statistics.fmean(known)
    scale = 1.0 / math.sqrt(statistics.pvariance(known, mean) + 1e-8)
    assert white[mask].tolist() == pytest.approx(
        [(v - mean) * scale for v in known], rel=1e-6, abs=1e-6
    )
    assert kept[mask].tolist() == pytest.approx(
        [(v - mean) * scale + mean for v in known], rel=1e-6, abs=1e-6
    )
