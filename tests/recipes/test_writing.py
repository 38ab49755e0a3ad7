"""Choices as YAML: what was chosen is read back, each reason stands above its line."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shardwise.config import yaml12
from shardwise.recipes.writing import WIDTH, Choice, as_tree, as_yaml

PLAIN: Any = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()
)
DATA = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc.: #'", min_size=1, max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(DATA)
def test_data_on_one_line_are_read_back(data: Any) -> None:
    line = yaml12.inline(data)
    assert "\n" not in line
    found = yaml12.parse(f"key: {line}\n", "here").data["key"]
    assert found == data and type(found) is type(data)


def test_numbers_are_short() -> None:
    assert [yaml12.inline(x) for x in (1e-5, 3e-4, 2.5e-7, 0.1, 1e22)] == [
        "1e-5", "0.0003", "2.5e-7", "0.1", "1e22",
    ]  # fmt: skip


@given(st.lists(st.tuples(DATA, st.text(max_size=300)), min_size=1, max_size=6))
def test_a_recipe_is_read_back(values: list[tuple[Any, str]]) -> None:
    places = [
        ("name",), ("engine", "layout"), ("engine", "precision"), ("stages", 0, "kind"),
        ("stages", 0, "batch", "seq_len"), ("stages", 0, "data", "sources"),
    ]  # fmt: skip
    choices = [Choice(keys, *said) for keys, said in zip(places, values)]
    text = as_yaml(choices, "what it is\nand what starts it")
    assert yaml12.parse(text, "here").data == as_tree(choices)


def test_comments_stand_above_what_they_are_about() -> None:
    data = ("stages", 0, "data")
    choices = [
        Choice(("name",), "a", ""),
        Choice(("engine", "precision"), "auto", "bf16 there"),
        Choice(("stages", 0, "kind"), "sft", ""),
        Choice(("stages", 0, "batch", "micro_batch"), 4, "fits"),
        Choice(("stages", 0, "batch", "seq_len"), 512, "holds " + "95 % of the rows " * 9),
        Choice((*data, "sources"), [{"kind": "alpaca", "path": "a b.json"}], "12 rows"),
        Choice((*data, "validation"), [{"kind": "alpaca", "path": "b" * 90}], "own"),
    ]
    lines = as_yaml(choices, "a").splitlines()
    assert lines[:3] == ["# a", "name: a", "# engine.precision: bf16 there"]
    assert lines[3] == "engine: {precision: auto}"
    assert lines[4:7] == ["stages:", "  - kind: sft", "    # batch.micro_batch: fits"]
    assert "    batch: {micro_batch: 4, seq_len: 512}" in lines
    assert lines[lines.index("      # sources: 12 rows") + 1] == (
        "      sources: [{kind: alpaca, path: a b.json}]"
    )
    assert max(map(len, lines[:-1])) <= WIDTH
