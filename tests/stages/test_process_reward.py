"""A process reward model learns which steps are right, the same on every layout, and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.losses.config import StepScoresConfig
from shardwise.losses.scores import score_of
from shardwise.stages.run import preflight
from tests.stages.recipes import metrics, recipe, run, run_and_die, weights
from tests.support.daily import daily
from tests.support.pool import RankPool

FP64 = "engine.precision=fp64"
SCORED = {"reward_model_weight": 1.0, "verifier_weight": 0.0}


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [r for r in metrics(folder) if r["kind"] == kind]


def from_file(config: dict[str, Any], file: Path, **data: Any) -> dict[str, Any]:
    [stage] = config["stages"]
    del stage["task"]
    source = {"kind": "steps", "path": str(file)}
    stage["data"] = {"sources": [source], "validation": [source], **data}
    return config


@pytest.mark.parametrize("layout", daily(["dp2.zero2", "tp2.sp", "pp2", "cp2.ring"], 1))
def test_layout_and_micro_batch_change_nothing(
    ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    key = "stages.process_reward.batch"
    ranks.run(run, recipe(one, "process_reward"), FP64, f"{key}.micro_batch=4", world=1)
    cut = [FP64, f"{key}.micro_batch=1", f"engine.layout={layout}"]
    ranks.run(run, recipe(two, "process_reward"), *cut, world=2)
    for kind in ("train", "validation"):
        for a, b in zip(rows(one, kind), rows(two, kind), strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"kind", "stage"}:
                assert b[name] == pytest.approx(a[name], rel=1e-9, abs=1e-9), name
    for name, value in weights(one, "process_reward").items():
        torch.testing.assert_close(
            weights(two, "process_reward")[name], value, rtol=1e-8, atol=1e-9
        )


def test_it_learns_which_steps_are_right(ranks: RankPool, tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    answers = "yes no yes,no no,yes yes,yes no,no,yes yes,no,no,yes no".replace(",", "\n").split(
        " "
    )
    lines = [
        {"prompt": f"{i}?", "steps": text, "labels": [x == "yes" for x in text.split("\n")]}
        for i, text in enumerate(answers)
    ]
    file.write_text("\n".join(json.dumps(x) for x in lines))
    config = from_file(recipe(tmp_path / "run", "process_reward"), file)
    ranks.run(run, config, "stages.process_reward.steps=40", world=1)
    first, last = rows(tmp_path / "run")[0], rows(tmp_path / "run")[-1]
    assert last["loss"] < 0.5 * first["loss"] and last["step_accuracy"] >= 0.9
    said = rows(tmp_path / "run", "validation")[-1]
    assert said["val_step_accuracy_1"] >= 0.9 and said["val_calibration_error"] < 0.25
    assert "val_step_accuracy_5" not in said  # no answer has so many
    assert said["val_answer_accuracy_min"] >= 0.9


def test_made_answers_are_right_up_to_a_step(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "process_reward")
    config["stages"][0] |= {"steps": 2, "answers_per_problem": 2, "num_held_out": 8}
    ranks.run(run, config, "stages.process_reward.optimizer.lr=1e-30", world=1)
    [said] = rows(tmp_path / "run", "validation")[-1:]
    # Half are right throughout, so more than half of all steps are; not all are.
    assert 0.5 < said["val_step_label"] < 1.0


@pytest.mark.slow
def test_killed_run_ends_like_an_unbroken_one(ranks: RankPool, tmp_path: Path) -> None:
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    ranks.run(run, recipe(clean, "process_reward"), world=2)
    ranks.run(run_and_die, recipe(broken, "process_reward"), "process_reward", 3, world=2)
    ranks.run(run, recipe(broken, "process_reward"), world=2)
    a, b = weights(clean, "process_reward"), weights(broken, "process_reward")
    assert all(torch.equal(a[n], b[n]) for n in a) and metrics(clean) == metrics(broken)


@pytest.mark.parametrize("kind", ["online_dpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_it_scores_wherever_a_reward_model_does(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    config = recipe(tmp_path / "run", "process_reward", kind)
    config["stages"][0]["steps"] = 1
    config["stages"][1] |= {**SCORED, "reward_steps": {"separator": "e", "aggregate": "product"}}
    ranks.run(run, config, f"stages.{kind}.steps=1", world=2)
    file = tmp_path / "run" / "rollouts" / kind / "step_00000000.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({r["model_score"] for r in records}) > 1
    assert all(0.0 < r["model_score"] < 1.0 for r in records)


def test_a_score_is_read_at_step_ends_alone() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    tokens, scores = list(map(ord, "ab;c;d")), np.array([2.0, -1.0, 0.5])
    config = StepScoresConfig.model_validate({"separator": ";", "aggregate": "min"})
    score = score_of(config, Letters())  # type: ignore[arg-type]
    assert score.read_at(tokens) == [2, 4, 5]
    assert score.total(scores) == pytest.approx(1 / (1 + np.exp(1.0)))
    answer = score_of(None, Letters())  # type: ignore[arg-type]
    assert answer.read_at(tokens) == [5] and answer.total(scores[:1]) == 2.0


@pytest.mark.parametrize(
    ("earlier", "keys", "said"),
    [
        ("process_reward", SCORED, "reward_steps.*scores steps; say how"),
        ("reward", SCORED | {"reward_steps": {}}, "reward_steps.*scores answers, not steps"),
    ],
)
def test_a_model_that_is_read_otherwise_than_trained_is_refused(
    tmp_path: Path, earlier: str, keys: dict[str, Any], said: str
) -> None:
    config = recipe(tmp_path / "run", earlier, "online_dpo")
    config["stages"][1] |= keys
    with pytest.raises(ConfigError, match=said):
        preflight(load_config(config).config, 1)
    with pytest.raises(ConfigError, match="reward_model_weight is 0"):
        config["stages"][1] |= {
            "reward_steps": {},
            "reward_model_weight": 0.0,
            "verifier_weight": 1,
        }
        load_config(config)


def test_labels_that_are_no_chances_are_refused_with_their_line(
    ranks: RankPool, tmp_path: Path
) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text(json.dumps({"prompt": "a?", "steps": ["x"], "labels": [-1]}))
    config = from_file(recipe(tmp_path / "run", "process_reward"), file)
    with pytest.raises(Exception, match=r"line 1, byte 0: labels .-1. are no chances"):
        ranks.run(run, config, world=1)
    config["run_dir"] = str(tmp_path / "hard")
    ranks.run(run, config, "stages.process_reward.data.hard_above=0.5", world=1)
