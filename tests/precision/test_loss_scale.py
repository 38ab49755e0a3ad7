"""The loss scale against a straightforward replay of its rules."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import CheckpointError, ShardwiseError
from shardwise.precision.loss_scale import DynamicLossScale


def test_grows_after_the_interval_and_backs_off_at_once() -> None:
    scale = DynamicLossScale(init=8.0, growth=2.0, interval=3, backoff=0.5)
    seen = []
    for bad in [False, False, False, False, True, False, False, False]:
        scale.update(bad)
        seen.append(scale.value)
    assert seen == [8, 8, 16, 16, 8, 8, 8, 16]
    assert scale.num_skipped == 1


def test_a_bad_step_restarts_the_count_of_good_ones() -> None:
    scale = DynamicLossScale(init=8.0, interval=2)
    for bad in [False, True, False]:
        scale.update(bad)
    assert scale.value == 4.0
    scale.update(False)
    assert scale.value == 8.0


def test_overflow_at_the_minimum_is_an_error_and_the_maximum_holds() -> None:
    scale = DynamicLossScale(init=2.0, minimum=1.0, maximum=4.0, interval=1)
    scale.update(True)
    with pytest.raises(ShardwiseError, match="diverged"):
        scale.update(True)
    for _ in range(5):
        scale.update(False)
    assert scale.value == 4.0


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40), st.integers(1, 5))
def test_resume_from_json_continues_exactly(steps: list[bool], cut: int, interval: int) -> None:
    whole = DynamicLossScale(interval=interval, minimum=2.0**-100)
    first = DynamicLossScale(interval=interval, minimum=2.0**-100)
    for bad in steps:
        whole.update(bad)
    for bad in steps[:cut]:
        first.update(bad)
    second = DynamicLossScale(interval=interval, minimum=2.0**-100)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for bad in steps[cut:]:
        second.update(bad)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"scale": "x", "good_steps": 0, "num_skipped": 0},
        {"scale": float("nan"), "good_steps": 0, "num_skipped": 0},
        {"scale": 2.0**30, "good_steps": 0, "num_skipped": 0},
        {"scale": 1.0, "good_steps": -1, "num_skipped": 0},
    ],
)
def test_damaged_state_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    scale = DynamicLossScale()
    before = scale.state_dict()
    with pytest.raises(CheckpointError):
        scale.load_state_dict(state)
    assert scale.state_dict() == before


@pytest.mark.parametrize(
    "bad", [{"growth": 1.0}, {"backoff": 1.0}, {"interval": 0}, {"init": 2.0**-20}]
)
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="loss scale"):
        DynamicLossScale(**bad)  # type: ignore[arg-type]
