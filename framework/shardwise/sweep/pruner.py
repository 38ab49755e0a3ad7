"""Which running trial will not win: pure functions of the curves, for every method of search."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from shardwise.sweep.config import HalvingPrunerConfig, MedianPrunerConfig
from shardwise.sweep.objective import Curve


def verdict(
    config: MedianPrunerConfig | HalvingPrunerConfig,
    sign: int,
    mine: Curve,
    others: Sequence[Curve],
) -> str | None:
    """Why the trial with curve ``mine`` is to stop now; None: it goes on.

    ``sign``: 1 where lower is better, else -1. ``others``: of every other trial, ended or not.
    """
    if not mine:
        return None
    if isinstance(config, MedianPrunerConfig):
        return _median(config, sign, mine, others)
    return _halving(config, sign, mine, others)


def best_by(curve: Curve, step: int, sign: int) -> float | None:
    """The best value up to a step, of a curve that has come that far."""
    if not curve or curve[-1][0] < step:
        return None
    return min((sign * v for s, v in curve if s <= step), default=None)


def _median(
    config: MedianPrunerConfig, sign: int, mine: Curve, others: Sequence[Curve]
) -> str | None:
    step = mine[-1][0]
    reached = [b for curve in others if (b := best_by(curve, step, sign)) is not None]
    if step < config.min_steps or len(reached) < config.min_trials:
        return None
    best, middle = best_by(mine, step, sign), statistics.median(reached)
    assert best is not None
    if best <= middle:
        return None
    return (
        f"best {sign * best:.4g} by step {step}, worse than the median {sign * middle:.4g} of "
        f"{len(reached)} others"
    )


def rungs(config: HalvingPrunerConfig, step: int) -> list[int]:
    """The rungs up to a step, the highest first."""
    if step < config.min_steps:
        return []
    highest = math.floor(math.log(step / config.min_steps, config.factor) + 1e-9)
    return [config.min_steps * config.factor**k for k in range(highest, -1, -1)]


def _halving(
    config: HalvingPrunerConfig, sign: int, mine: Curve, others: Sequence[Curve]
) -> str | None:
    for rung in rungs(config, mine[-1][0])[:1]:
        best = best_by(mine, rung, sign)
        reached = [b for curve in others if (b := best_by(curve, rung, sign)) is not None]
        if best is None or len(reached) + 1 < config.factor:
            return None
        kept = (len(reached) + 1) // config.factor
        ahead = sum(other < best for other in reached)
        if ahead >= kept:
            return (
                f"{ahead + 1} of {len(reached) + 1} at rung {rung} ({sign * best:.4g}), of which "
                f"{kept} go on"
            )
    return None
