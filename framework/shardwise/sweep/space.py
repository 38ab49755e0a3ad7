"""The points of a sweep: every one of a grid or list, or draws that are functions of their number.

A draw is made of a hash of (seed, number, key): it depends neither on other keys nor on what a
library calls random, so a space of random search may be gone on with at any number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

from shardwise.errors import ConfigError
from shardwise.sweep.config import (
    Dimension,
    GridConfig,
    ListConfig,
    OptunaConfig,
    Point,
    RandomConfig,
    SweepConfig,
    identity,
)

MOST_ATTEMPTS = 2_000  # to draw a point that was not drawn before


def uniform(*names: object) -> float:
    """A number in [0, 1) that is a function of ``names``."""
    text = "/".join(map(str, names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


def pick(dimension: Dimension, u: float) -> object:
    """The value of a dimension at ``u`` in [0, 1) of its scale; numbers to six figures."""
    low, high = dimension.low, dimension.high
    if dimension.integers and dimension.scale == "log":  # each with the share between its halves
        assert low is not None and high is not None
        ends = math.log(low - 0.5), math.log(high + 0.5)
        return min(max(round(math.exp(ends[0] + u * (ends[1] - ends[0]))), low), high)
    choices = dimension.choices
    if choices is not None:
        return choices[int(u * len(choices))]
    assert low is not None and high is not None
    if dimension.integers:
        step = dimension.step or 1
        return low + int(u * ((high - low) // step + 1)) * step
    if dimension.scale == "log":
        value = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
    else:
        value = low + u * (high - low)
    return min(max(float(f"{value:.6g}"), low), high)


def draw(config: SweepConfig, seed: int, number: int, attempt: int = 0) -> Point:
    """The point of a number, before others of the same values are left out."""
    point: Point = {}
    for key in config.order:
        if config.active(key, point):
            point[key] = pick(config.search[key], uniform(seed, number, attempt, key))
    return point


def _distinct(config: SweepConfig, seed: int, trials: int) -> Iterator[Point]:
    size = config.size
    if size is not None and trials > size:
        raise ConfigError(f"method.trials: {trials}, but the search has {size} points; use grid")
    seen: set[str] = set()
    for number in range(trials):
        for attempt in range(MOST_ATTEMPTS):
            point = draw(config, seed, number, attempt)
            if identity(point) not in seen:
                seen.add(identity(point))
                yield point
                break
        else:
            raise ConfigError(
                f"method.trials: {trials}, but the search has hardly more than {number} points"
            )


def points(config: SweepConfig) -> list[Point] | None:
    """What is known to be run, in order, no point twice; None where a sampler will say.

    Raises ConfigError for a space with fewer points than trials.
    """
    method = config.method
    match method:
        case GridConfig():
            found = config.grid()
        case ListConfig():
            found = list(method.points)
        case RandomConfig():
            found = list(_distinct(config, method.seed, method.trials))
        case OptunaConfig():
            return None
    unique = {identity(point): point for point in found}
    return list(unique.values())


def samples(config: SweepConfig) -> list[Point]:
    """Points to check a space by whose trials are not known yet: each value of each key, once.

    Of a range its ends. The other keys have their first value.
    """
    ends = {
        key: d.choices if d.choices is not None else [d.low, d.high]
        for key, d in config.search.items()
    }
    found = []
    for varied in config.order:
        for value in ends[varied]:
            point: Point = {}
            for key in config.order:
                if config.active(key, point):
                    point[key] = value if key == varied else ends[key][0]
            found.append(point)
    unique = {identity(point): point for point in found}
    return list(unique.values())
