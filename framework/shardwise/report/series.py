"""Curves: steps and values, running means, and an honest way to draw very long ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Series:
    """One metric of one stage, by step; non-finite values are left out but counted."""

    steps: Ints
    values: Floats
    num_nonfinite: int = 0

    @staticmethod
    def of(steps: Sequence[int], values: Sequence[float]) -> Series:
        """From plain lists."""
        return Series(np.asarray(steps, np.int64), np.asarray(values, np.float64))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def last(self) -> float | None:
        """The newest value, or None."""
        return float(self.values[-1]) if len(self) else None


EMPTY = Series(np.empty(0, np.int64), np.empty(0, np.float64))


@dataclass(frozen=True)
class Envelope:
    """A curve in at most as many points as a screen shows.

    ``steps`` is each bucket's middle; nothing between ``low`` and ``high`` is hidden.
    ``width`` is how many points of the original a bucket stands for (1: nothing was merged).
    """

    steps: Floats
    mean: Floats
    low: Floats
    high: Floats
    width: int


def envelope(series: Series, max_points: int = 1000) -> Envelope:
    """Merge neighbours into buckets of equal count until at most ``max_points`` are left."""
    n = len(series)
    width = max(1, -(-n // max_points))
    if width == 1:
        v = series.values
        return Envelope(series.steps.astype(np.float64), v, v, v, 1)
    starts = np.arange(0, n, width)
    counts = np.diff(np.append(starts, n))
    ends = starts + counts - 1
    return Envelope(
        steps=(series.steps[starts] + series.steps[ends]) / 2.0,
        mean=np.add.reduceat(series.values, starts) / counts,
        low=np.minimum.reduceat(series.values, starts),
        high=np.maximum.reduceat(series.values, starts),
        width=width,
    )


def smooth(values: Floats, width: int) -> Floats:
    """Centred running mean with triangular weights over ``width`` points to either side.

    Centred, so that it does not lag behind a curve that falls; at the ends the weights that
    would reach beyond are left out.
    """
    kernel = np.bartlett(2 * width + 3)[1:-1]
    total = np.convolve(values, kernel, mode="full")[width:-width]
    weight = np.convolve(np.ones_like(values), kernel, mode="full")[width:-width]
    return np.asarray(total / weight)


def wilson(fraction: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for ``fraction`` of ``n`` trials (95 % by default).

    Source: E. B. Wilson, JASA 22 (1927), p. 209. Raises ValueError for n < 1.
    """
    if n < 1 or not 0.0 <= fraction <= 1.0:
        raise ValueError(f"need n >= 1 and a fraction in [0, 1], got {n} and {fraction}")
    centre = (fraction + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


# 0.975 quantiles of Student's t for 1 to 10 degrees of freedom, to three decimals.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent runs, and half its 95 % interval (Student's t); None of a single one.

    Beyond ten degrees of freedom by the expansion of Abramowitz and Stegun, 26.7.5.
    """
    n, z = len(values), 1.959964
    mean = float(np.mean(values))
    if n < 2:
        return mean, None
    df = n - 1
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    far = z + sum(term / df**k for k, term in enumerate(terms, 1))
    t = _T[df - 1] if df <= len(_T) else far
    return mean, float(t * np.std(values, ddof=1) / np.sqrt(n))
