"""Task countdown: its problems can be solved, and its verifier agrees with Python's own parser."""

from __future__ import annotations

import ast
import operator
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.rewards import ProblemSet, RewardItem, Scorer
from shardwise.rewards.countdown import countdown, countdown_match
from shardwise.rewards.scoring import RewardConfig
from shardwise.rewards.task_configs import CountdownConfig

OPERATORS: Any = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}  # fmt: skip


def value(node: ast.expr) -> Fraction:
    """An expression of integers and the four operators."""
    if isinstance(node, ast.BinOp):
        result: Fraction = OPERATORS[type(node.op)](value(node.left), value(node.right))
        return result
    assert isinstance(node, ast.Constant) and isinstance(node.value, int)
    return Fraction(node.value)


def parsed(text: str) -> Fraction | None:
    """The value as Python reads it; None where it is no such expression."""
    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, AssertionError, KeyError, ZeroDivisionError):
        return None


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.sampled_from(["+-", "+-*", "+-*/"]))
@settings(max_examples=60)
def test_problems(seed: int, index: int, signs: str) -> None:
    config = CountdownConfig(operators=tuple(signs), max_number=30)  # type: ignore[arg-type]
    problem = countdown(config, seed, index)
    assert problem == countdown(config, seed, index)
    assert parsed(problem.answer) == problem.meta["target"] <= 100
    assert countdown_match(problem.answer, problem.meta) == 1.0
    last = None
    for step in problem.meta["steps"].split(", "):
        left, _, right = step.partition(" = ")
        assert last is None or left.startswith(f"{last} ")
        assert parsed(left) == (last := int(right)) >= 0


@given(st.text("12 34+-*/()", max_size=14), st.integers(-20, 40))
@settings(max_examples=400)
def test_verifier_reads_as_python_does(text: str, target: int) -> None:
    numbers = [1, 2, 34]
    got = parsed(text)
    tree = ast.parse(text.strip(), mode="eval") if got is not None else None
    used = sorted(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)) if tree else []
    right = got == target and used == numbers
    assert countdown_match(text, {"numbers": numbers, "target": target}) == float(right)


@pytest.mark.parametrize(
    "text",
    ["(8 - 5) * 8", "8 * (8 - 5)", "[8-5]*8 = 24", "(8 − 5) × 8", "((8) * ((8 - 5)))"],  # noqa: RUF001
)
def test_right(text: str) -> None:
    assert countdown_match(text, {"numbers": [5, 8, 8], "target": 24}) == 1.0


@pytest.mark.parametrize(
    "text",
    [None, "", "24", "8 * 5 - 8 - 8", "8 + 8 + 5", "(8 - 5) * 8 = 25", "(8 - 5) * 8)", "(8 - 5 * 8",
     "8 8 5", "8 / (5 - 5)", "-8 + 8 * 5", "8 ** 8 ** 5", "9" * 5000, "(" * 5000, "(8-5)*8;1",
     "\u0668 * (8 - 5)"],
)  # fmt: skip
def test_wrong(text: str | None) -> None:
    assert countdown_match(text, {"numbers": [5, 8, 8], "target": 24}) == 0.0


def test_as_a_reward() -> None:
    config = RewardConfig.model_validate({"parts": [{"kind": "countdown", "extract": "marker"}]})
    problem = countdown(CountdownConfig(), 0, 0)
    said = f"{problem.meta['steps']}\nAnswer: {problem.answer}"
    item = RewardItem(problem.question, said, problem.answer, problem.meta)
    with Scorer(config) as scorer:
        right, unscorable = scorer.score([item, RewardItem("Make 3", said, problem.answer)])
    assert right.value == 1.0
    assert unscorable.value is None and "numbers and target" in unscorable.reason


def test_no_problem_fits() -> None:
    config = CountdownConfig(operators=("*",), max_number=10_000, max_target=1, min_numbers=4)
    with pytest.raises(ConfigError, match="raise max_target"):
        ProblemSet(config, "held_out", 3)


def test_bad_config() -> None:
    with pytest.raises(ValueError) as caught:
        CountdownConfig.model_validate({"kind": "countdown", "min_numbers": 6})
    assert "min_numbers must not exceed max_numbers" in str(caught.value)
