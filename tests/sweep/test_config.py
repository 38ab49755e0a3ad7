"""What a sweep may say, and what is said where it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shardwise.errors import ConfigError
from shardwise.sweep.config import SweepConfig
from tests.sweep.conftest import LR

Load = Callable[..., SweepConfig]


@pytest.mark.parametrize(
    ("search", "rest", "said"),
    [
        ({}, {}, "search .*is empty"),
        (None, {"searchh": {}}, "searchh .*unknown key; did you mean 'search'"),
        (None, {"method": "gridd"}, "method.kind .*given 'gridd'.* did you mean 'grid'"),
        ({LR: {"low": 1e-4, "high": 1e-2}}, {}, f"search.{LR}.* a grid needs values"),
        ({LR: {"low": 1e-2, "high": 1e-4}}, {"method": {"kind": "random", "trials": 2}}, "above"),
        ({LR: {"low": 0, "high": 1.0, "scale": "log"}}, {}, "needs low above 0"),
        ({LR: {"values": [1], "low": 2}}, {}, "says values, low; say values, options, or low"),
        ({LR: {"values": [1, 1]}}, {}, "1 stands twice"),
        ({LR: {"values": []}}, {}, "values"),
        ({LR: {"value": [1]}}, {}, "unknown key; did you mean 'values'"),
        ({"a": [1], "b": {"values": [1], "when": {"c": [1]}}}, {}, "when.c.* is not searched"),
        ({"seed": [1], "b": {"values": [1], "when": {"sed": [1]}}}, {}, "did you mean 'seed'"),
        ({"a": [1], "b": {"values": [1], "when": {"a": [2]}}}, {}, r"is never \[2\]"),
        (
            {
                "a": {"values": [1], "when": {"b": [1]}},
                "b": {"values": [1], "when": {"a": [1]}},
            },
            {},
            "is a circle: a, b",
        ),
        (None, {"overrides": {LR: 1.0}}, f"overrides.{LR}.*is searched too"),
        ({"seed": [1, 2]}, {"repeats": 2}, "repeats .*seed is searched"),
        ({"run_dir": ["a"]}, {}, "each trial has a folder of its own"),
        (None, {"method": {"kind": "list", "points": [{"seed": 1}]}}, "leave search out"),
        (None, {"pruner": "halving"}, "pruner.*min_steps .*required"),
    ],
)
def test_a_wrong_sweep_names_its_key(
    load: Load, search: Any, rest: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        load(search, **rest)


def test_a_list_is_short_for_values(load: Load) -> None:
    assert load({"seed": [1, 2]}) == load({"seed": {"values": [1, 2]}})


def test_options_set_several_keys_at_once(load: Load) -> None:
    small = {"model.hidden_size": 32, "model.ffn_size": 64}
    config = load({"size": {"options": {"small": small, "big": {"model.hidden_size": 64}}}})
    assert config.grid() == [{"size": "small"}, {"size": "big"}]
    assert config.overrides_of({"size": "small"}) == small
    assert config.searched == {"model.hidden_size", "model.ffn_size"}


def test_a_step_makes_a_range_a_grid(load: Load) -> None:
    config = load({"a": {"low": 0.1, "high": 0.5, "step": 0.1}, "b": {"low": 3, "high": 5}})
    assert config.search["a"].choices == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert config.search["b"].choices == [3, 4, 5]
