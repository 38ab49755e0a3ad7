"""The stop rule of a flywheel: the decision, and what it does to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.repeat import StopRule
from shardwise.stages.until import best_of_rounds
from tests.stages.recipes import TASK, recipe, run
from tests.support.pool import RankError, RankPool


@pytest.mark.parametrize(
    ("values", "gain", "patience", "expected"),
    [
        ([0.5], 0.0, 1, (0, False)),
        ([0.5, 0.7], 0.0, 1, (1, False)),
        ([0.5, 0.5], 0.0, 1, (0, True)),
        ([0.5, 0.54], 0.05, 1, (0, True)),
        ([0.5, 0.54, 0.56], 0.05, 2, (2, False)),
        ([0.5, 0.4], 0.0, 2, (0, False)),
        ([0.5, 0.4, 0.45], 0.0, 2, (0, True)),
    ],
)
def test_the_rule(
    values: list[float], gain: float, patience: int, expected: tuple[int, bool]
) -> None:
    assert (
        best_of_rounds(values, StopRule(metric="m", min_gain=gain, patience=patience)) == expected
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 0.5), st.integers(1, 4))
def test_the_best_round_is_never_behind_by_more_than_the_gain(
    values: list[float], gain: float, patience: int
) -> None:
    best, stop = best_of_rounds(values, StopRule(metric="m", min_gain=gain, patience=patience))
    assert max(values) - values[best] <= gain
    assert stop == (len(values) - 1 - best >= patience)


def flywheel(folder: Path, metric: str, **rule: Any) -> dict[str, Any]:
    config = recipe(folder, "pretrain", "sft", "sft")
    inner, last = config["stages"][1:]
    config["stages"][1:] = [
        {
            "kind": "repeat",
            "name": "round",
            "times": 3,
            "until": {"metric": metric, **rule},
            "stages": [inner],
        },
        {**last, "name": "last", "steps": 1},
    ]
    config["evaluations"] = [{"kind": "problems", "task": TASK, "num_problems": 8}]
    return config


@pytest.mark.slow
def test_rounds_end_and_the_best_model_goes_on(ranks: RankPool, tmp_path: Path) -> None:
    """An untrained model solves nothing in any round: the second adds nothing."""
    config = flywheel(tmp_path / "run", "accuracy")
    [summary, _] = ranks.run(run, config, world=2)
    results = {r["name"]: r for r in summary["stages"]}
    assert list(results) == ["pretrain", "sft-1", "round-1", "sft-2", "round-2", "last"]
    assert results["round-1"]["skip"] == [] and results["round-1"]["drop"] == []
    assert results["round-2"]["skip"] == ["sft-3", "round-3"]
    assert results["round-2"]["drop"] == ["sft-2", "round-2"]
    assert results["last"]["parent"] == results["sft-1"]["checkpoint"]
    before = (tmp_path / "run" / "summary.json").read_text()
    [again, _] = ranks.run(run, config, world=2)
    assert again["stages"] == json.loads(before)["stages"], "what was decided stays so"


def test_a_figure_that_nobody_measures_is_named(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="has the figure accurcy; they have accuracy"):
        ranks.run(run, flywheel(tmp_path / "run", "accurcy"), world=1)
