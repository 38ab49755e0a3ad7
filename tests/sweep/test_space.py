"""Properties of every space: draws are functions of their number, conditions hold, none twice."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.sweep import space
from shardwise.sweep.config import Dimension, SweepConfig, identity

KEYS = ("a", "b.c", "d", "e.f.g")


@st.composite
def dimensions(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["values", "ints", "floats", "log", "log ints", "steps"]))
    if kind == "values":
        values = st.one_of(st.integers(0, 9), st.sampled_from(["x", "y", "z"]), st.booleans())
        return {"values": draw(st.lists(values, min_size=1, max_size=4, unique_by=repr))}
    low = draw(st.integers(1, 50))
    high = low + draw(st.integers(0, 30))
    match kind:
        case "ints":
            return {"low": low, "high": high}
        case "log ints":
            return {"low": low, "high": high, "scale": "log"}
        case "steps":
            return {"low": low, "high": high, "step": draw(st.integers(1, 9))}
    scale = "log" if kind == "log" else "linear"
    return {"low": low / 1000, "high": high / 1000, "scale": scale}


@st.composite
def spaces(draw: st.DrawFn, method: dict[str, Any] | None = None) -> SweepConfig:
    """Random spaces; some keys ask about values of keys in front of them, or behind."""
    keys = draw(st.permutations(KEYS))[: draw(st.integers(1, len(KEYS)))]
    search = {key: draw(dimensions()) for key in keys}
    order = draw(st.permutations(keys))
    for before, key in itertools.pairwise(order):
        choices = Dimension(**search[before]).choices
        if choices and draw(st.booleans()):
            asked = draw(st.lists(st.sampled_from(choices), min_size=1, max_size=2))
            search[key]["when"] = {before: asked}
    method = method or {"kind": "random", "trials": 1, "seed": draw(st.integers(0, 99))}
    return SweepConfig.model_validate(
        {"recipe": "r.yaml", "search": search, "method": method}, strict=False
    )


@given(spaces(), st.integers(0, 10_000))
def test_a_draw_is_a_function_of_its_number(config: SweepConfig, number: int) -> None:
    point = space.draw(config, 7, number)
    turned = dict(reversed(list(config.search.items())))
    again = config.model_copy(update={"search": turned})
    assert space.draw(again, 7, number) == point
    alone = {k: d for k, d in config.search.items() if not d.when}
    few = config.model_copy(update={"search": alone})
    assert space.draw(few, 7, number) == {k: v for k, v in point.items() if k in alone}


@given(spaces(), st.integers(0, 1000), st.integers(0, 1000))
def test_a_point_is_in_its_space(config: SweepConfig, seed: int, number: int) -> None:
    point = space.draw(config, seed, number)
    for key, dimension in config.search.items():
        wanted = all(point.get(k, math.nan) in v for k, v in dimension.when.items())
        assert (key in point) == wanted
        if key not in point:
            continue
        value, choices = point[key], dimension.choices
        if choices is not None:
            assert value in choices
        else:
            assert dimension.low <= value <= dimension.high  # type: ignore[operator]
            assert isinstance(value, int) == dimension.integers
    if config.size is not None:
        assert identity(point) in set(map(identity, config.grid()))


@given(spaces(), st.integers(1, 12))
def test_random_points_are_distinct_and_more_of_them_begin_alike(
    config: SweepConfig, trials: int
) -> None:
    size = config.size
    asked = config.method.model_copy(update={"trials": trials})
    many = config.model_copy(update={"method": asked})
    if size is not None and trials > size:
        with pytest.raises(ConfigError, match=f"the search has {size} points"):
            space.points(many)
        return
    points = space.points(many)
    assert points is not None and len(set(map(identity, points))) == trials
    fewer = asked.model_copy(update={"trials": max(1, trials // 2)})
    assert space.points(config.model_copy(update={"method": fewer})) == points[: fewer.trials]


@given(spaces())
def test_a_grid_has_each_point_once(config: SweepConfig) -> None:
    if config.size is None:
        return
    grid = config.grid()
    assert len(set(map(identity, grid))) == len(grid) == config.size
    # Without conditions it is the product.
    free = {k: d.model_copy(update={"when": {}}) for k, d in config.search.items()}
    whole = config.model_copy(update={"search": free})
    lengths = [len(d.choices or []) for d in free.values()]
    assert whole.size == math.prod(lengths) >= len(grid)


def test_draws_fill_their_range_evenly() -> None:
    for dimension in (
        Dimension(low=1e-4, high=1e-1, scale="log"),
        Dimension(low=2, high=5),
        Dimension(low=1, high=100, scale="log"),
        Dimension(values=["x", "y", "z"]),
    ):
        values = [space.pick(dimension, space.uniform(0, i)) for i in range(4000)]
        if dimension.scale == "log" and not dimension.integers:
            middle = sum(v < math.sqrt(1e-5) for v in values)  # type: ignore[operator]
            assert abs(middle / 4000 - 0.5) < 0.04
        elif dimension.scale == "log":
            assert abs(sum(v <= 9 for v in values) / 4000 - math.log(19) / math.log(201)) < 0.04  # type: ignore[operator]
        else:
            choices = dimension.choices or []
            for choice in choices:
                assert abs(values.count(choice) / 4000 - 1 / len(choices)) < 0.04


@given(spaces())
def test_samples_try_each_value(config: SweepConfig) -> None:
    seen = space.samples(config)
    for key in config.order:
        if not config.search[key].when:
            dimension = config.search[key]
            wanted = dimension.choices or [dimension.low, dimension.high]
            assert {repr(p[key]) for p in seen} == {repr(v) for v in wanted}
