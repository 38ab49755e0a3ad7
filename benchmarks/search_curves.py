"""Accuracy against tokens drawn, of finished runs of one search recipe: a table, and a picture.

    python benchmarks/search_curves.py sudoku.png runs/sudoku_1 runs/sudoku_2 runs/sudoku_3

A job's name is its method's with its budget: ``vote8``, ``best8``, ``dvts8``, ``mcts8``; one
without a number, such as ``greedy``, is a line. Means over runs, with their lowest and highest.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shardwise.search.tree import from_record

TITLES = {"vote": "majority vote", "best": "best of N", "dvts": "DVTS", "mcts": "MCTS"}


class Point(NamedTuple):
    """Tokens drawn for a problem, and the share of problems that are right: mean and extremes."""

    tokens: float
    right: float
    lowest: float
    highest: float


def measured(jobs: Sequence[Path]) -> Point:
    """Of one job in each run."""
    each = [_one(job) for job in jobs]
    tokens, right = (statistics.fmean(column) for column in zip(*each, strict=True))
    return Point(tokens, right, min(r for _, r in each), max(r for _, r in each))


def _one(job: Path) -> tuple[float, float]:
    lines = (job / "artifacts" / "trees.jsonl").read_text().splitlines()
    trees = [from_record(json.loads(line)) for line in lines]
    scores = [None if t.answer is None else t.nodes[t.answer].scores["verifier"] for t in trees]
    right = statistics.fmean((s or 0.0) > 0.5 for s in scores)
    return statistics.fmean(t.cost.drawn for t in trees), right


def main(picture: str, *runs: str) -> None:
    """Print the table and draw the picture."""
    folders = [Path(run) / "stages" for run in runs]
    curves: dict[str, dict[int, Point]] = {}
    for job in sorted(p.parents[1].name for p in folders[0].glob("*/artifacts/trees.jsonl")):
        found = re.fullmatch(r"(.*?)(\d*)", job)
        assert found
        point = measured([folder / job for folder in folders])
        curves.setdefault(found[1], {})[int(found[2] or 0)] = point
    columns = sorted(curves, key=lambda name: ["greedy", *TITLES].index(name))
    print("| budget |", " | ".join(TITLES.get(name, name) for name in columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for budget in sorted({b for points in curves.values() for b in points}):
        cells = [_cell(curves[name].get(budget)) for name in columns]
        print(f"| {budget or 1} |", " | ".join(cells), "|")
    draw(picture, {name: curves[name] for name in columns})


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    return f"{point.right:.3f} ({point.lowest:.3f}-{point.highest:.3f}), {point.tokens:.0f} tokens"


def draw(picture: str, curves: dict[str, dict[int, Point]]) -> None:
    """A line a method; horizontal where a method has no budgets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, points in curves.items():
        tokens, right, lowest, highest = zip(*(points[b] for b in sorted(points)), strict=True)
        if len(points) == 1:
            axes.axhline(right[0], color="0.4", linestyle="--", label=name)
            continue
        [line] = axes.plot(tokens, right, marker="o", label=TITLES.get(name, name))
        axes.fill_between(tokens, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="tokens drawn for a problem", ylabel="right", ylim=(0, None))
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
