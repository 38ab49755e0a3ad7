"""Verifiers: what counts as the answer, as a number, as a form."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.rewards.numerals import parse_number
from shardwise.rewards.verifiers import (
    Extract,
    exact_match,
    extract_answer,
    language_consistency,
    numeric_match,
    overlong_penalty,
    template_match,
)


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        (" 42\n", "whole", "42"),
        ("so\nAnswer: 4\nbye", "marker", "4"),
        ("Answer: 1 Answer: 2", "marker", "2"),
        ("four", "marker", None),
        ("<answer>1</answer> <answer> 2 </answer>", "tag", "2"),
        ("<answer>2", "tag", None),
        (r"thus \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        (r"\boxed{1", "boxed", None),
        ("from 1,234 to (56)!", "last_number", "56"),
        ("no number", "last_number", None),
        ("first 7, so **42**.", "last_number", "42"),
        ("7, (42).", "last_number", "42"),
        (r"7 = \boxed{42}", "last_number", "42"),
        (r"7 = \frac{3}{4}.", "last_number", "3/4"),
        ("Answer: 1\nand then Answer:", "marker", None),
        ("**Answer:** *blue*", "marker", "blue"),
        ("answer\uff1a 7", "marker", "7"),
        ("<answer>1</answer> or <answer>2", "tag", None),
        (r"\boxed{1} or \boxed{2", "boxed", None),
        (r"\fbox{a} \boxed {\text{b c}}", "boxed", "b c"),
        ("of 7, x=5", "last_number", "5"),
        ("is `-3`, then", "last_number", "-3"),
    ],
)
def test_extraction(text: str, how: Extract, answer: str | None) -> None:
    assert extract_answer(text, how) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-1,234.5", Fraction(-2469, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        (r"50\%", Fraction(1, 2)),
        ("$12", Fraction(12)),
        (r"$\boxed{7}$", Fraction(7)),
        ("1e-3", Fraction(1, 1000)),
        ("\u22125", Fraction(-5)),
        (".5", Fraction(1, 2)),
    ],
)
def test_numbers(text: str, number: Fraction) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "--3",
        "1,23",
        "1234,567",
        "3/0",
        "1_000",
        "\u00b2",
        "1e999999",
        "nan",
        "inf",
        "9" * 999,
    ],
)
def test_not_numbers(text: str) -> None:
    assert parse_number(text) is None


@given(st.integers(-(10**12), 10**12))
def test_integers_round_trip_in_every_spelling(value: int) -> None:
    for text in (str(value), f"{value:,}", f"{value}.00", rf"\boxed{{{value}}}", f"{value}/1"):
        assert parse_number(text) == value
    assert numeric_match(f"{value:,}", str(value)) == 1.0
    assert numeric_match(str(value + 1), str(value), rel_tol=0.0) == 0.0


@given(st.text(max_size=80))
def test_no_text_breaks_a_parser(text: str) -> None:
    for how in ("whole", "marker", "tag", "boxed", "last_number"):
        answer = extract_answer(text, how)  # type: ignore[arg-type]
        assert exact_match(answer, "x") in (0.0, 1.0)
        assert numeric_match(answer, "7") in (0.0, 1.0)
    assert template_match(text, "<a>{}</a>") in (0.0, 1.0)
    assert 0.0 <= language_consistency(text, ["LATIN"]) <= 1.0


def test_numeric_match() -> None:
    assert numeric_match("0.3333", "1/3", rel_tol=1e-3) == 1.0
    assert numeric_match("0.3333", "1/3") == 0.0
    assert numeric_match("5", "4", abs_tol=1.0) == 1.0
    assert numeric_match(None, "4") == numeric_match("four", "4") == 0.0
    assert numeric_match("4", "four") is None


def test_exact_match() -> None:
    assert exact_match("e\u0301  x", "\u00e9 x") == 1.0
    assert exact_match("A", "a") == 0.0
    assert exact_match("A", "a", ignore_case=True) == 1.0
    assert exact_match(None, "a") == 0.0


TAGS = "<think>{}</think><answer>{}</answer>"


@pytest.mark.parametrize(
    ("text", "template", "score"),
    [
        ("<think>a</think>\n <answer>b</answer>\n", TAGS, 1.0),
        ("<think> </think><answer>b</answer>", TAGS, 0.0),
        ("<think>a</think>x<answer>b</answer>", TAGS, 0.0),
        ("<think>a</think><answer>b</answer>x", TAGS, 0.0),
        ("x<think>a</think><answer>b</answer>", TAGS, 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", TAGS, 0.0),
        ("<answer>b</answer><think>a</think>", TAGS, 0.0),
        ("some. Answer: 4", "{}Answer:{}", 1.0),
        ("Answer: 4", "{}Answer:{}", 0.0),
        ("some. Answer:", "{}Answer:{}", 0.0),
        ("exactly", "exactly", 1.0),
        ("exactly!", "exactly", 0.0),
    ],
)
def test_templates(text: str, template: str, score: float) -> None:
    assert template_match(text, template) == score


@given(*[st.text("ab c", min_size=1).filter(str.strip)] * 2)
def test_every_filled_template_matches(thought: str, answer: str) -> None:
    assert template_match(TAGS.format(thought, answer), TAGS) == 1.0


def test_language() -> None:
    assert language_consistency("Hello, 2 worlds!", ["LATIN"]) == 1.0
    assert language_consistency("ab\u0436\u0437", ["LATIN"]) == 0.5
    assert language_consistency("\u4f60\u597d", ["CJK"]) == 1.0
    assert language_consistency("\u3042\u30ab\u4e2d", ["CJK", "HIRAGANA", "KATAKANA"]) == 1.0
    assert language_consistency("123", ["LATIN"]) == 1.0


@given(st.integers(0, 200))
def test_overlong(num_tokens: int) -> None:
    expected = 0.0 if num_tokens <= 80 else max(-1.0, -(num_tokens - 80) / 20)
    assert overlong_penalty(num_tokens, 100, 20) == pytest.approx(expected)
    assert overlong_penalty(None, 100, 20) is None
