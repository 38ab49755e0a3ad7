"""The layout grammar and its refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.parallel.layout import Layout, parse_layout


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.permutations([0, 1, 2]))
def test_round_trip_in_any_order(shard: int, copies: int, zero: int, order: list[int]) -> None:
    dp = shard * copies
    tokens = [f"dp{dp}", f"hsdp{shard}", f"zero{zero}"]
    layout = parse_layout(".".join(tokens[i] for i in order), dp)
    assert layout == Layout(dp, shard, zero)
    assert parse_layout(str(layout), dp) == layout
    assert layout.replicate == copies


def test_defaults() -> None:
    assert parse_layout("auto", 4) == Layout(4, 4, 1)
    assert parse_layout("zero3", 2) == Layout(2, 2, 3)
    assert parse_layout("dp2.zero0", 2) == Layout(2, 1, 0)


@pytest.mark.parametrize(
    "text,world,words",
    [
        ("dp3", 2, "--nproc 3"),
        ("dp4.hsdp3", 4, "hsdp4|hsdp2"),
        ("dp2.foo", 2, "known: dpN"),
        ("dp2.dp2", 2, "twice"),
        ("dp2.zero4", 2, "0 to 3"),
        ("dp4.hsdp2.zero0", 4, "drop hsdp2"),
        ("", 1, "not a layout token"),
    ],
)
def test_refused_with_a_mend(text: str, world: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_layout(text, world)
