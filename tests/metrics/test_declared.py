"""Declared metrics of a run: by stage and name, of kinds that nobody knows too."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from shardwise.metrics import declared

CONFIG: dict[str, Any] = {
    "stages": [{"kind": "pretrain"}, {"kind": "grpo", "name": "policy"}, {"kind": "of_another"}],
    "evaluations": [
        {"kind": "problems"},
        {"kind": "problems", "name": "hard"},
        {"kind": "of_another"},
    ],
}


def test_by_stage_and_name() -> None:
    table = declared.of(CONFIG)
    assert list(table) == ["start", "pretrain", "policy", "of_another"]
    assert table["policy"]["reward_mean"].better == "higher"
    assert table["policy"]["loss"].better is None and table["pretrain"]["loss"].better == "lower"
    assert "loss" not in table["start"] and table["start"]["accuracy"].summary == "stages"
    # What a line of progress begins with.
    assert next(iter(table["policy"])) == "reward_mean"


def test_a_second_evaluation_of_a_kind_has_its_name_in_front() -> None:
    metric = declared.of(CONFIG)["pretrain"]["hard.accuracy"]
    assert metric.label == "held-out accuracy, hard"
    assert metric.count == "hard.num_problems" and metric.references == ("hard.majority_baseline",)


def test_what_nobody_declared_has_a_name() -> None:
    table = declared.of(CONFIG)
    assert declared.metric_of(table, "of_another", "loss").label == "training loss"
    assert declared.metric_of(table, "gone", "val_hit_rate").label == "validation hit rate"
    assert declared.metric_of(table, "policy", "made_up").better is None


def test_best_is_the_stages_word() -> None:
    best = [declared.best_of(CONFIG, name) for name in ("pretrain", "policy", "of_another", "gone")]
    assert [m and m.name for m in best] == ["val_loss", "reward_mean", "val_loss", None]


@pytest.mark.parametrize("odd", [None, "text", [], {}, [None, "x", {}], [{"kind": 3}]])
def test_any_odd_config(odd: Any) -> None:
    assert "accuracy" not in declared.of({"stages": odd, "evaluations": odd})["start"]


def test_no_torch() -> None:
    code = (
        "import sys; from shardwise.metrics import declared; "
        "declared.of({'stages': [{'kind': 'ppo'}]}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
