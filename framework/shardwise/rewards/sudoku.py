"""Sudokus of four by four, each with one solution: a row of an answer must fit all others."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Protocol

from shardwise.rewards.families import Problem, seeded

SIZE, BOX = 4, 2
FEWEST = 4  # clues with which a solution can be the only one (of this size)


class ClueConfig(Protocol):
    """What `sudoku` reads of its config."""

    @property
    def min_clues(self) -> int: ...
    @property
    def max_clues(self) -> int: ...


def sudoku(config: ClueConfig, seed: int, index: int) -> Problem:
    """``Solve 42.. ..24 .1.2 2..1`` -> ``4213 1324 3142 2431``; its steps are its rows."""
    rng = seeded("sudoku", seed, index)
    every = grids()
    while True:
        grid = rng.choice(every)
        shown = rng.sample(range(SIZE**2), rng.randint(config.min_clues, config.max_clues))
        if sum(all(other[i] == grid[i] for i in shown) for other in every) == 1:
            break
    asked = "".join(n if i in shown else "." for i, n in enumerate(grid))
    rows = _rows(grid)
    return Problem(
        id=f"sudoku-{seed}-{index}",
        question=f"Solve {' '.join(_rows(asked))}",
        answer=" ".join(rows),
        meta={"clues": len(shown), "steps": ", ".join(rows)},
    )


def _rows(grid: str) -> list[str]:
    return [grid[i : i + SIZE] for i in range(0, SIZE**2, SIZE)]


@functools.cache
def grids() -> Sequence[str]:
    """All 288 filled grids, row by row."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    found: list[list[str]] = [[]]
    for _ in range(SIZE):
        found = [[*above, row] for above in found for row in rows if _fits(above, row)]
    return ["".join(grid) for grid in found]


def _fits(above: Sequence[str], row: str) -> bool:
    """Whether a row repeats nothing in the columns and boxes of those above it."""
    box = above[len(above) // BOX * BOX :]
    columns = all(n != other[i] for other in above for i, n in enumerate(row))
    boxes = all(
        not set(row[i : i + BOX]) & set(other[i : i + BOX])
        for other in box
        for i in range(0, SIZE, BOX)
    )
    return columns and boxes
