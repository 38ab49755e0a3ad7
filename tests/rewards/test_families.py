"""Answers of the built-in families, against a count and against Python's own arithmetic."""

from __future__ import annotations

import ast
import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.rewards.families import arithmetic, count_letters
from shardwise.rewards.sudoku import grids, sudoku
from shardwise.rewards.task_configs import ArithmeticConfig, CountLettersConfig, SudokuConfig

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value(node: ast.expr) -> int:
    """An expression of integers, +, - and *."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp):
        return -value(node.operand)
    assert isinstance(node, ast.Constant)
    return int(node.value)


@given(st.integers(0, 2**31), st.integers(0, 10**9))
@settings(max_examples=40)
def test_count_letters(seed: int, index: int) -> None:
    config = CountLettersConfig(letters="xyz", min_length=3, max_length=5)
    problem = count_letters(config, seed, index)
    target, _, text = problem.question.removeprefix("Count the letter ").partition(": ")
    letters = text.split()
    assert 3 <= len(letters) == problem.meta["length"] <= 5
    assert problem.answer == str(letters.count(target))
    assert problem.meta["steps"].endswith(problem.answer)
    assert problem == count_letters(config, seed, index)


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "chain"])
@given(seed=st.integers(0, 2**31), index=st.integers(0, 10**6))
@settings(max_examples=30)
def test_arithmetic(operation: str, seed: int, index: int) -> None:
    config = ArithmeticConfig(operations=(operation,), max_digits=4)
    problem = arithmetic(config, seed, index)
    expression = problem.question.removeprefix("What is ").removesuffix("?")
    assert problem.answer == str(value(ast.parse(expression, mode="eval").body))
    for step in problem.meta["steps"].split(", "):
        left, _, right = step.partition(" = ")
        assert value(ast.parse(left, mode="eval").body) == int(right)


@given(st.integers(0, 2**31), st.integers(0, 10**6))
@settings(max_examples=40)
def test_comparison(seed: int, index: int) -> None:
    problem = arithmetic(ArithmeticConfig(operations=("compare",)), seed, index)
    a, _, b = problem.question.removeprefix("Which is larger, ").removesuffix("?").partition(" or ")
    assert a != b and problem.answer == str(max(int(a), int(b)))


def test_digits_are_as_configured() -> None:
    config = ArithmeticConfig(operations=("add",), min_digits=3, max_digits=3)
    for index in range(50):
        a, _, b = arithmetic(config, 0, index).question[8:-1].partition(" + ")
        assert len(a) == len(b) == 3


@given(st.integers(0, 2**31), st.integers(0, 10**6))
@settings(max_examples=20)
def test_sudoku(seed: int, index: int) -> None:
    problem = sudoku(SudokuConfig(min_clues=4, max_clues=6), seed, index)
    clues = problem.question.removeprefix("Solve ").split()
    rows = problem.answer.split()
    columns = ["".join(column) for column in zip(*rows, strict=True)]
    boxes = [rows[y][x : x + 2] + rows[y + 1][x : x + 2] for y in (0, 2) for x in (0, 2)]
    assert all(sorted(unit) == list("1234") for unit in (*rows, *columns, *boxes))
    given = [(y, x) for y in range(4) for x in range(4) if clues[y][x] != "."]
    assert 4 <= len(given) == problem.meta["clues"] <= 6
    assert all(clues[y][x] == rows[y][x] for y, x in given)
    others = [g for g in grids() if all(g[4 * y + x] == rows[y][x] for y, x in given)]
    assert others == ["".join(rows)]  # no other solution
    assert problem.meta["steps"].split(", ") == rows


def test_there_are_288_grids() -> None:
    assert len(set(grids())) == 288
