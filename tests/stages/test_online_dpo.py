"""Online DPO: answers of its own, ranked as they are scored, the same on every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from tests.stages.recipes import metrics, recipe, run, weights
from tests.support.pool import RankPool

FP64 = "engine.precision=fp64"


def test_layout_and_micro_batch_change_nothing(ranks: RankPool, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = [FP64, "stages.online_dpo.updates_per_rollout=2"]
    ranks.run(run, recipe(one, "online_dpo"), *options, world=1)
    cut = ["stages.online_dpo.batch.micro_batch=1", "engine.layout=dp2.zero2"]
    ranks.run(run, recipe(two, "online_dpo"), *options, *cut, world=2)
    rows = [[r for r in metrics(folder) if r["kind"] == "train"] for folder in (one, two)]
    assert any("margin" in row for row in rows[0])
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"kind", "stage"}:
            assert b[name] == pytest.approx(a[name], rel=1e-8, abs=1e-9), name
    for name, value in weights(one, "online_dpo").items():
        torch.testing.assert_close(weights(two, "online_dpo")[name], value, rtol=1e-8, atol=1e-9)


def test_a_reward_model_ranks_and_the_rollout_says_how(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "reward", "online_dpo")
    options = ("stages.reward.steps=1", "stages.online_dpo.steps=2")
    weighed = ("stages.online_dpo.reward_model_weight=1.0", "stages.online_dpo.verifier_weight=0.0")
    ranks.run(run, config, *options, *weighed, world=1)
    rows = [r for r in metrics(tmp_path / "run") if r["stage"] == "online_dpo"]
    # Scores of a model differ, so every prompt has a pair.
    assert [r["pair_fraction"] for r in rows if r["kind"] == "train"] == [1.0, 1.0]
    file = tmp_path / "run" / "rollouts" / "online_dpo" / "step_00000001.jsonl"
    for line in file.read_text().splitlines():
        record = json.loads(line)
        assert record["rating"] == record["reward"] == record["model_score"]


def test_a_loss_that_compares_nothing_is_refused(tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "online_dpo")
    config["stages"][0]["loss"] = {"kind": "kto"}
    with pytest.raises(ConfigError, match="kto compares no answers"):
        load_config(config)
