"""Pruning: a pure function of curves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.sweep.config import HalvingPrunerConfig, MedianPrunerConfig
from shardwise.sweep.objective import Curve
from shardwise.sweep.pruner import rungs, verdict

MEDIAN = MedianPrunerConfig(kind="median", min_steps=2, min_trials=3)
HALVING = HalvingPrunerConfig(kind="halving", min_steps=2, factor=2)


def level(value: float, steps: int = 8) -> Curve:
    return [(step, value) for step in range(1, steps + 1)]


CURVES = st.lists(
    st.builds(level, st.integers(0, 50).map(float), st.integers(1, 20)), min_size=1, max_size=12
)


def test_the_median_stops_the_worse_half() -> None:
    others = [level(1.0), level(2.0), level(3.0)]
    assert "median 2" in str(verdict(MEDIAN, 1, level(2.5), others))
    assert verdict(MEDIAN, 1, level(2.0), others) is None
    assert verdict(MEDIAN, -1, level(2.5), others) is None
    assert verdict(MEDIAN, -1, level(1.5), others) is not None


def test_the_median_waits_for_steps_and_others() -> None:
    others = [level(1.0), level(1.0), level(1.0)]
    assert verdict(MEDIAN, 1, level(9.0, 1), others) is None
    assert verdict(MEDIAN, 1, level(9.0), others[:2]) is None
    assert verdict(MEDIAN, 1, level(9.0, 8), [level(1.0, 4)] * 3) is None  # nobody is as far
    assert verdict(MEDIAN, 1, [], others) is None


def test_a_good_start_is_remembered() -> None:
    mine = [(1, 0.5), (2, 9.0), (3, 9.0)]
    assert verdict(MEDIAN, 1, mine, [level(1.0)] * 3) is None


def test_halving_lets_a_share_go_on() -> None:
    assert rungs(HALVING, 17) == [16, 8, 4, 2]
    assert rungs(HALVING, 1) == []
    others = [level(float(v), 2) for v in (1, 2, 3)]
    assert verdict(HALVING, 1, level(1.5, 2), others) is None
    assert "3 of 4 at rung 2" in str(verdict(HALVING, 1, level(2.5, 3), others))
    assert verdict(HALVING, 1, level(9.0, 2), []) is None  # the first is not judged alone


@given(CURVES, st.sampled_from([MEDIAN, HALVING]), st.sampled_from([1, -1]))
def test_the_best_is_never_stopped(curves: list[Curve], config: object, sign: int) -> None:
    ahead = min(range(len(curves)), key=lambda i: min(sign * v for _, v in curves[i]))
    others = [curve for i, curve in enumerate(curves) if i != ahead]
    assert verdict(config, sign, curves[ahead], others) is None  # type: ignore[arg-type]


@given(CURVES, st.sampled_from([MEDIAN, HALVING]), st.randoms())
def test_the_order_of_others_does_not_matter(
    curves: list[Curve], config: object, dice: object
) -> None:
    mine, *others = curves
    turned = list(others)
    dice.shuffle(turned)  # type: ignore[attr-defined]
    assert verdict(config, 1, mine, others) == verdict(config, 1, mine, turned)  # type: ignore[arg-type]


@given(CURVES)
def test_direction_is_a_sign(curves: list[Curve]) -> None:
    mine, *others = curves
    turned = [[(s, -v) for s, v in c] for c in curves]
    for config in (MEDIAN, HALVING):
        lower = verdict(config, 1, mine, others) is None
        assert lower == (verdict(config, -1, turned[0], turned[1:]) is None)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_of_many_that_arrive_a_share_of_the_factor_survives(factor: int) -> None:
    config = HalvingPrunerConfig(kind="halving", min_steps=2, factor=factor)
    curves = [level(float(i), 2) for i in range(24)]
    gone_on = [
        i for i in range(24) if not verdict(config, 1, curves[i], curves[:i] + curves[i + 1 :])
    ]
    assert gone_on == list(range(24 // factor))
