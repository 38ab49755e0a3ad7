"""Schedules against hand values and properties; the ramp against a naive sum."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.schema import BatchConfig, ScheduleConfig
from shardwise.errors import ConfigError
from shardwise.optim.schedules import consumed_before, global_batch_at, lr_factor


def curve(total: int, **settings: object) -> list[float]:
    config = ScheduleConfig(**settings)  # type: ignore[arg-type]
    return [lr_factor(config, step, total) for step in range(total)]


def test_hand_values() -> None:
    assert curve(4, kind="constant", warmup_steps=2) == [0.5, 1, 1, 1]
    assert curve(6, kind="linear", warmup_steps=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert curve(4, kind="linear", min_ratio=0.5) == [1, 0.875, 0.75, 0.625]
    half = math.sqrt(0.5)
    assert curve(4, kind="cosine") == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert curve(6, kind="wsd", warmup_steps=1, decay_steps=2) == [1, 1, 1, 1, 1, 0.5]
    restarts = curve(8, kind="cosine_restarts", cycle_steps=2, cycle_factor=2.0)
    quarter = [1, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert restarts == pytest.approx([1, 0.5, *quarter, 1, (1 + math.cos(math.pi / 8)) / 2])


def test_restarts_match_torch() -> None:
    """torch.optim.lr_scheduler.CosineAnnealingWarmRestarts is the reference for SGDR."""
    import torch

    for factor in (1, 2):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, T_0=3, T_mult=factor, eta_min=0.1
        )
        ours = curve(
            30, kind="cosine_restarts", cycle_steps=3, cycle_factor=float(factor), min_ratio=0.1
        )
        for step in range(30):
            assert ours[step] == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            theirs.step()


schedules = st.sampled_from(["constant", "linear", "cosine", "wsd", "cosine_restarts"])


@given(schedules, st.integers(0, 20), st.integers(1, 60), st.floats(0, 1), st.integers(1, 30))
def test_bounds_monotone_parts_and_continuity(
    kind: str, warmup: int, rest: int, min_ratio: float, width: int
) -> None:
    total = warmup + rest
    decay = min(width, rest)
    values = curve(
        total,
        kind=kind,
        warmup_steps=warmup,
        min_ratio=min_ratio,
        decay_steps=decay,
        cycle_steps=width,
        cycle_factor=1.5,
    )
    assert all(0 < v <= 1 for v in values)
    assert values[:warmup] == sorted(values[:warmup])
    after = values[warmup:]
    assert after[0] == 1.0
    assert all(v >= min_ratio - 1e-12 for v in after)
    if kind == "cosine_restarts":
        return
    assert after == sorted(after, reverse=True)
    # No jump is steeper than the shape's own slope, the virtual step past the end included.
    slope = {"constant": 0, "linear": 1 / rest, "cosine": math.pi / 2 / rest, "wsd": 1 / decay}[
        kind
    ]
    end = 1.0 if kind == "constant" else min_ratio
    for a, b in itertools.pairwise([*after, end]):
        assert a - b <= slope * (1 - min_ratio) + 1e-12


def test_past_the_end_the_floor_holds() -> None:
    for kind in ("linear", "cosine", "wsd"):
        config = ScheduleConfig(kind=kind, min_ratio=0.25, decay_steps=2)  # type: ignore[arg-type]
        assert lr_factor(config, 100, 10) == 0.25


@given(schedules, st.integers(1, 40), st.integers(1, 40), st.data())
def test_more_steps_leave_the_length_out_or_follow_the_longer_shape(
    kind: str, done: int, more: int, data: st.DataObject
) -> None:
    """What a longer stage does to steps that a shorter one would not have had."""
    warmup = data.draw(st.integers(0, done))
    width = data.draw(st.integers(1, max(1, done - warmup)))
    settings = {"warmup_steps": warmup, "decay_steps": width, "cycle_steps": width}
    config = ScheduleConfig(kind=kind, min_ratio=0.1, **settings)  # type: ignore[arg-type]
    short, long = done + 0, done + more
    before = [lr_factor(config, s, short) for s in range(done)]
    after = [lr_factor(config, s, long) for s in range(done)]
    if kind in ("constant", "cosine_restarts"):
        assert before == after
    elif kind == "wsd":  # only a decay that had begun is another
        assert before[: max(warmup, done - width)] == after[: max(warmup, done - width)]
    else:
        assert all(a <= b for a, b in zip(before, after, strict=True))


def test_ramp_hand_values() -> None:
    config = BatchConfig(global_batch=16, ramp_start=4, ramp_steps=4)
    assert [global_batch_at(config, s) for s in range(6)] == [4, 7, 10, 13, 16, 16]
    assert [global_batch_at(config, s, unit=4) for s in range(6)] == [4, 4, 8, 12, 16, 16]
    assert [consumed_before(config, s) for s in range(6)] == [0, 4, 11, 21, 34, 50]


@given(st.data())
def test_ramp_properties(data: st.DataObject) -> None:
    unit = data.draw(st.integers(1, 6))
    full = unit * data.draw(st.integers(1, 40))
    start = data.draw(st.integers(1, full))
    config = BatchConfig(
        global_batch=full, ramp_start=start, ramp_steps=data.draw(st.integers(1, 50))
    )
    sizes = [global_batch_at(config, s, unit) for s in range(60)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == full
    assert all(size % unit == 0 and unit <= size <= full for size in sizes)
    assert [consumed_before(config, s, unit) for s in range(60)] == [
        sum(sizes[:s]) for s in range(60)
    ]


def test_without_a_ramp_far_steps_are_exact_integers() -> None:
    config = BatchConfig(global_batch=1_000_003)
    assert consumed_before(config, 10**12) == 1_000_003 * 10**12


@pytest.mark.parametrize(
    "settings", [{"ramp_start": 4}, {"ramp_steps": 4}, {"ramp_start": 32, "ramp_steps": 4}]
)
def test_ramps_that_cannot_be(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="ramp_start"):
        global_batch_at(BatchConfig(global_batch=16, **settings), 0)


def test_unit_must_divide_the_full_batch() -> None:
    with pytest.raises(ConfigError, match="multiple of 3"):
        global_batch_at(BatchConfig(global_batch=16), 0, unit=3)
