"""Rules of games: what can be told of an answer, or of its beginning, from the question alone.

A reward compares with what is known to be right; rules know nothing of it. So they may judge at the
time of answering, and what breaks them half-way need not be written to its end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from shardwise.rewards.countdown import apply_operator, countdown_match
from shardwise.rewards.sudoku import BOX, SIZE
from shardwise.rewards.verifiers import Extract, extract_answer

Style = Literal["answer", "steps", "tags"]
# Where a solution of a style has its answer.
ANSWER_OF: Mapping[Style, Extract] = {"answer": "whole", "steps": "marker", "tags": "tag"}
# What stands before its steps, and between them and the answer.
_MARKS: Mapping[Style, tuple[str, str]] = {
    "answer": ("", ""), "steps": ("", "\nAnswer:"), "tags": ("<think>", "</think><answer>")
}  # fmt: skip
_INTEGER = re.compile(r"\d+", re.ASCII)
_STEP = re.compile(r"(-?\d{1,9}) ([-+*/]) (-?\d{1,9}) = (-?\d{1,9})", re.ASCII)


class Rules(NamedTuple):
    """A game's. ``solves``: of a question and an answer, whether it is right; ``allows``: of a
    question, and the steps and the answer so far, whether what goes on from them may be.
    """

    solves: Callable[[str, str], bool]
    allows: Callable[[str, str, str], bool]


def obeys(rules: Rules, style: Style, question: str, text: str, finished: bool) -> bool:
    """Whether a completion in a style, or, unless it is ``finished``, its beginning is allowed."""
    if finished:
        answer = extract_answer(text, ANSWER_OF[style])
        return answer is not None and rules.solves(question, answer)
    opened, closed = _MARKS[style]
    if not closed:
        return rules.allows(question, "", text)
    steps, _, answer = text[len(opened) :].partition(closed)
    mark = closed[0]  # a mark may not be whole yet
    return rules.allows(question, steps.partition(mark)[0], answer.partition(mark)[0])


def _sudoku_solves(question: str, answer: str) -> bool:
    rows = answer.split()
    return [len(row) for row in rows] == [SIZE] * SIZE and _fits(question, rows)


def _sudoku_allows(question: str, steps: str, answer: str) -> bool:
    return _fits(question, steps.replace(",", " ").split()) and _fits(question, answer.split())


def _fits(question: str, rows: Sequence[str]) -> bool:
    """Whether rows from the top, the last perhaps not whole, keep to the clues, and have every
    number once in its row, column and box.
    """
    clues = question.split()[-SIZE:]
    if len(rows) > SIZE or any(len(row) != SIZE for row in rows[:-1]):
        return False
    if any(len(row) > SIZE for row in rows[-1:]):
        return False
    cells = [(y, x, n) for y, row in enumerate(rows) for x, n in enumerate(row)]
    numbers = [str(n + 1) for n in range(SIZE)]
    if any(n not in numbers or clues[y][x] not in (".", n) for y, x, n in cells):
        return False
    places = [
        (where, n)
        for y, x, n in cells
        for where in (("row", y), ("column", x), ("box", y // BOX, x // BOX))
    ]
    return len(set(places)) == len(places)


def _countdown(question: str) -> tuple[int, list[int]]:
    target, *numbers = map(int, _INTEGER.findall(question))
    return target, numbers


def _countdown_solves(question: str, answer: str) -> bool:
    target, numbers = _countdown(question)
    return countdown_match(answer, {"numbers": numbers, "target": target}) == 1.0


def _countdown_allows(question: str, steps: str, answer: str) -> bool:
    """Each step is a true sum of numbers that are there, and puts its result in their place; the
    last result is the target. An answer has only numbers that are there.
    """
    target, numbers = _countdown(question)
    left = Counter(numbers)
    whole = steps if answer else steps.rpartition(",")[0]  # the last one may go on
    for step in filter(None, map(str.strip, whole.split(","))):
        read = _STEP.fullmatch(step)
        if read is None:
            return False
        a, b, result = int(read[1]), int(read[3]), int(read[4])
        left.subtract((a, b))
        if min(left.values()) < 0 or apply_operator(read[2], a, b) != result:
            return False
        left[result] += 1
        if left.total() == 1 and result != target:
            return False
    written = _INTEGER.findall(answer)
    if answer[-1:].isdigit():
        written.pop()  # it may go on
    return not Counter(written) - Counter(map(str, numbers))


SUDOKU = Rules(_sudoku_solves, _sudoku_allows)
COUNTDOWN = Rules(_countdown_solves, _countdown_allows)
