"""Downsampling hides nothing; smoothing does not lag; intervals against known values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.report.series import Series, envelope, smooth, t_interval, wilson


@given(
    st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=400),
    st.integers(1, 50),
)
def test_envelope_covers_every_point(values: list[float], max_points: int) -> None:
    array = np.array(values)
    series = Series(np.arange(1, len(values) + 1), array)
    drawn = envelope(series, max_points)
    assert len(drawn.mean) <= max_points
    assert drawn.low.min() == array.min() and drawn.high.max() == array.max()
    for i, value in enumerate(values):
        bucket = i // drawn.width
        assert drawn.low[bucket] <= value <= drawn.high[bucket]
    inside = (drawn.low <= drawn.mean + 1e-3) & (drawn.mean <= drawn.high + 1e-3)
    assert inside.all()
    counts = np.bincount(np.arange(len(values)) // drawn.width)
    np.testing.assert_allclose((drawn.mean * counts).sum(), array.sum(), rtol=1e-9, atol=1e-3)
    assert (np.diff(drawn.steps) > 0).all()


def test_short_series_stay_as_they_are() -> None:
    drawn = envelope(Series(np.array([3, 9]), np.array([1.0, 2.0])))
    assert drawn.width == 1 and drawn.steps.tolist() == [3.0, 9.0]


@given(st.integers(1, 80), st.integers(1, 30))
def test_smooth_keeps_constants(n: int, width: int) -> None:
    np.testing.assert_allclose(smooth(np.full(n, 3.25), width), 3.25)


def test_smooth_is_centred() -> None:
    line = np.arange(50.0)
    inner = slice(5, -5)
    np.testing.assert_allclose(smooth(line, 4)[inner], line[inner])  # a lag would shift it
    impulse = np.zeros(21)
    impulse[10] = 1.0
    answer = smooth(impulse, 3)
    assert answer.argmax() == 10 and answer.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(answer, answer[::-1])


# Newcombe 1998, table I, score method without continuity correction.
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits / n, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_refuses() -> None:
    with pytest.raises(ValueError, match="fraction"):
        wilson(1.2, 10)
    with pytest.raises(ValueError, match="n >= 1"):
        wilson(0.5, 0)


@pytest.mark.parametrize(
    ("n", "t"), [(2, 12.706), (3, 4.303), (10, 2.262), (12, 2.201), (31, 2.042), (101, 1.984)]
)
def test_t_interval(n: int, t: float) -> None:
    """Quantiles of any table of Student's t."""
    values = np.random.default_rng(n).standard_normal(n).tolist()
    mean, half = t_interval(values)
    assert mean == pytest.approx(np.mean(values)) and half is not None
    assert half * np.sqrt(n) / np.std(values, ddof=1) == pytest.approx(t, abs=6e-4)
    assert t_interval([3.0]) == (3.0, None)
