"""Whom verify suspects: what fails in the same way, the smallest first."""

from __future__ import annotations

import math

import pytest

from shardwise.verify.compare import Difference
from shardwise.verify.pool import RankError
from shardwise.verify.rank import Failure
from shardwise.verify.suspects import SINGLE, Outcome, sub_layouts, suspect


def differs(kind: str, name: str, why: str = "") -> Outcome:
    return Outcome(found=[Difference(kind, name, math.inf, 1.0, 0.0, why=why)])


def raises(cause: str, where: str) -> Outcome:
    return Outcome(error=RankError(0, Failure(cause, "no", where, "", 0.0, "")))


def blamed(layout: str, *guilty: str, accumulates: bool = False) -> str:
    return suspect(layout, lambda part: part in guilty, lambda part: accumulates)


def test_the_fewest_axes_that_fail_are_suspected() -> None:
    whole = "dp2.zero3.tp2.sp.pp2.zbv"
    assert blamed(whole, "pp2.zbv", "tp2.pp2.zbv") == "pp2.zbv"
    assert blamed(whole, "dp2.zero3.tp2") == "dp2.zero3.tp2"
    assert blamed(whole) == whole


def test_of_one_axis_its_simpler_kind_comes_first() -> None:
    assert blamed("dp2.zero3", "dp2.zero0") == "dp2.zero0"
    assert blamed("dp2.zero3") == "dp2.zero3"
    assert blamed("pp2.zbv", "pp2.1f1b") == "pp2.1f1b"


def test_what_one_process_of_the_engine_does_no_axis_explains() -> None:
    said = blamed("dp2.zero3.tp2", SINGLE, "tp2")
    assert said.startswith("no axis") and "one process" in said and "tp2" not in said


def test_accumulation_is_named_where_one_micro_batch_is_sound() -> None:
    assert blamed("dp2.zero2", accumulates=True) == "dp2.zero2 with accumulation of micro-batches"
    alone = blamed("dp2.zero2", SINGLE, accumulates=True)
    assert alone.startswith("accumulation of micro-batches, since")


@pytest.mark.parametrize(
    "other,same",
    [
        (differs("gradient", "update 1 embed.weight"), True),
        (differs("gradient", "update 1 norm.weight"), False),
        (differs("weight", "update 1 embed.weight"), False),
        (raises("ValueError", "a.py:1 in f"), False),
        (Outcome(), False),
    ],
)
def test_a_part_must_fail_with_the_same_value(other: Outcome, same: bool) -> None:
    whole = differs("gradient", "update 1 embed.weight")
    assert other.fails_as(whole) is same
    assert whole.failed and other.failed is (other != Outcome())


def test_rounding_is_no_failure() -> None:
    assert not Outcome(found=[Difference("loss", "update 1", 0.5, 0.5, 1.0)]).failed


def test_a_part_must_raise_at_the_same_place() -> None:
    whole = raises("ValueError", "a.py:1 in f")
    assert raises("ValueError", "a.py:1 in f").fails_as(whole)
    assert not raises("ValueError", "a.py:2 in f").fails_as(whole)
    assert not raises("TypeError", "a.py:1 in f").fails_as(whole)
    assert not Outcome(error=TimeoutError("no answer")).fails_as(whole)
    assert not differs("loss", "update 1").fails_as(whole)


def test_what_is_no_value_is_known_by_its_words_without_numbers() -> None:
    whole = differs("run", "", "sample 3 came about twice")
    assert differs("run", "", "sample 5 came about twice").fails_as(whole)
    assert not differs("run", "", "sample 3 is missing").fails_as(whole)


@pytest.mark.parametrize(
    "layout,first,parts",
    [
        ("pp2.zbv", "pp2.1f1b", 1),
        ("tp2.sp", "tp2", 1),
        ("dp2.zero2", "dp2.zero0", 1),
        ("dp2.zero0", None, 0),
        ("tp2.sp.pp2.zbv", "tp2", 7),
    ],
)
def test_parts_of_a_layout_are_never_itself(layout: str, first: str | None, parts: int) -> None:
    found = sub_layouts(layout)
    assert layout not in found and len(found) == parts
    assert not found or found[0] == first
