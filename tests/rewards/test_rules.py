"""Rules: they agree with what knows the answer, and never break off what leads to it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.rewards import Problem, ProblemSet, solution_text
from shardwise.rewards.countdown import countdown_match
from shardwise.rewards.rules import COUNTDOWN, SUDOKU, obeys
from shardwise.rewards.sudoku import grids
from shardwise.rewards.task_configs import CountdownConfig, SudokuConfig, TaskConfig

STYLES: Any = st.sampled_from(["answer", "steps", "tags"])
SUDOKUS = ProblemSet(SudokuConfig(min_clues=4), "held_out", 20).problems
GAMES = ProblemSet(CountdownConfig(operators=("+", "-", "*", "/")), "held_out", 20).problems
ASKED = "Solve 42.. ..24 .1.2 2..1"
MAKE = "Make 24 from 3, 5, 8"


def judged(config: TaskConfig, problem: Problem, text: str, finished: bool) -> bool:
    assert config.rules is not None
    return obeys(config.rules, config.style, problem.question, text, finished)


@given(style=STYLES, number=st.integers(0, 19), game=st.booleans(), data=st.data())
def test_no_beginning_of_a_solution_breaks_them(
    style: Any, number: int, game: bool, data: Any
) -> None:
    config = CountdownConfig(style=style) if game else SudokuConfig(style=style)
    problem = (GAMES if game else SUDOKUS)[number]
    text = solution_text(problem, config)
    end = data.draw(st.integers(0, len(text)))
    assert judged(config, problem, text[:end], finished=False)
    assert judged(config, problem, text, finished=True)


@given(problem=st.sampled_from(SUDOKUS), grid=st.sampled_from(grids()))
def test_one_grid_solves_a_sudoku(problem: Problem, grid: str) -> None:
    answer = " ".join(grid[i : i + 4] for i in range(0, 16, 4))
    assert SUDOKU.solves(problem.question, answer) == (answer == problem.answer)
    assert not SUDOKU.solves(problem.question, answer[:-1])


@given(problem=st.sampled_from(GAMES), answer=st.text("1234567890+-*/() ", max_size=12))
def test_an_expression_is_right_as_the_reward_says(problem: Problem, answer: str) -> None:
    for said in (answer, problem.answer):
        assert COUNTDOWN.solves(problem.question, said) == countdown_match(said, problem.meta)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", True), ("4", True), ("3", False),  # a clue
        ("4213 13", True), ("4211", False),  # in a row
        ("4213 1324 4", False), ("4213 2", False),  # in a column, in a box
        ("4213 132 3", False), ("42133", False), ("4213 1324 3142 2431 1", False), ("42x", False),
    ],
)  # fmt: skip
def test_beginnings_of_sudokus(text: str, allowed: bool) -> None:
    assert obeys(SUDOKU, "answer", ASKED, text, False) == allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("8 - 5 = ", True), ("8 - 5 = 4", True), ("8 - 5 = 4, ", False),  # a sum
        ("8 - 6 = 2, ", False), ("8 - 5 = 3, 8", True), ("8 - 5 = 3, 8 - 3 = 5, ", False),
        ("8 - 5 = 3, 3 * 3 = 9\nAnswer: ", False), ("8 - 5 = 3, 3 * 3 = 9\nAns", True),
        ("3 / 0 = 0, ", False), ("a, ", False), ("8 - 5 = 3,\nAnswer: (8 - 5) * 3", True),
        ("8 - 5 = 3\nAnswer: 8 - 5 - 5 ", False), ("8 - 5 = 3\nAnswer: 8 - 55", True),
    ],
)  # fmt: skip
def test_beginnings_of_numbers_games(text: str, allowed: bool) -> None:
    assert obeys(COUNTDOWN, "steps", MAKE, text, False) == allowed


def test_an_answer_that_was_not_given_is_not_right() -> None:
    assert not obeys(COUNTDOWN, "steps", MAKE, "8 - 5 = 3, 3 * 8 = 24", True)
    assert obeys(COUNTDOWN, "steps", MAKE, "so\nAnswer: (8 - 5) * 8", True) is False
