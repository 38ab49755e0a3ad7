"""`sweep --benchmark`: turns, steps that count, and what is known of the neighbours."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.metrics import timing
from shardwise.sweep.api import benchmark, benchmark_text
from shardwise.sweep.benchmark import benchmark_of
from shardwise.sweep.plan import make_plan
from shardwise.sweep.trial import override_words
from tests.sweep.conftest import LR, Write, starts

Load = Callable[..., Any]
GIVEN = {"turns": 3, "warmup": 1, "steps": 3, "wait_s": 0.0}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on looks at the machine."""
    monkeypatch.setattr(timing, "LOOK_SECONDS", 0.01)


def test_points_are_timed_in_turns(
    write: Write, fakes: Callable[..., None], looks: None, tmp_path: Path
) -> None:
    found = benchmark(write({LR: [0.01, 0.1]}, benchmark=GIVEN))
    folder = tmp_path / "sweep" / "benchmark"
    begun = [r["name"] for r in starts(folder) if r["event"] == "start"]
    assert begun == ["0000", "0001", "0000-r1", "0001-r1", "0000-r2", "0001-r2"]
    # The fake takes 1 / (step + 10 lr) seconds for 8 tokens; steps 2 to 4 count.
    fast, slow = found["rows"]
    for row, lr in ((fast, 0.1), (slow, 0.01)):
        seconds = sum(1 / (step + 10 * lr) for step in (2, 3, 4))
        assert row["point"] == {LR: lr} and row["turns"] == 3
        assert row["tokens_per_second"] == pytest.approx(24 / seconds)
        assert row["others"] is not None and not math.isnan(row["others"])
    assert slow["ratio"] == 1.0
    assert fast["ratio"] == pytest.approx(fast["tokens_per_second"] / slow["tokens_per_second"])
    assert json.loads((folder / "benchmark.json").read_text()) == found["rows"]
    assert "| 0001 | lr 0.1 |" in benchmark_text(found)
    again = benchmark(write({LR: [0.01, 0.1]}, benchmark=GIVEN))
    assert again["rows"] == found["rows"] and len(starts(folder)) == 12


def test_a_turn_is_a_short_run_of_one_stage(load: Load) -> None:
    config = benchmark_of(load({"engine.layout": ["zero1", "tp2"]}, benchmark=GIVEN))
    plan = make_plan(config, same_seed=True)
    run = load_config(config.recipe, override_words(plan.trials[-1].overrides)).config
    assert [s.steps for s in run.stages] == [4] and run.evaluations == []
    assert run.stages[0].engine.layout == "tp2" and run.stages[0].batch.seq_len == 16
    assert run.logging.every == 1 and run.seed == 5
    assert len(plan.trials) == 6 and plan.objective.better == "higher"


def test_optuna_cannot_take_turns(load: Load) -> None:
    config = load(method={"kind": "optuna", "trials": 2})
    with pytest.raises(ConfigError, match="takes turns: use grid, list or random"):
        benchmark_of(config)
