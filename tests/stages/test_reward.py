"""A reward model learns preferences, the same on every layout, and its checkpoint scores alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise import checkpoint
from shardwise.checkpoint.convert import convert, open_model
from shardwise.data.preferences import collate_rankings
from shardwise.data.tokenizer import load_tokenizer
from shardwise.models import registry
from shardwise.models.common.init import load_weights
from shardwise.ops.logits import selected_values
from shardwise.rewards.task_configs import CountLettersConfig
from shardwise.stages.rankings import made_rankings
from shardwise.verify.pool import RankError
from tests.stages.recipes import TASK, metrics, recipe, run, run_and_die, weights
from tests.support.pool import RankPool

FP64 = "engine.precision=fp64"


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [r for r in metrics(folder) if r["kind"] == kind]


@pytest.mark.parametrize(
    "options,layout,world",
    [
        pytest.param([], "dp2.zero2", 2, marks=pytest.mark.slow),
        pytest.param(
            ["stages.reward.loss.objective=plackett_luce"], "tp2.sp", 2, marks=pytest.mark.slow
        ),
        (["stages.reward.loss.centring=0.1", "stages.reward.batch.global_batch=3"], "dp2.zero0", 2),
        pytest.param(
            ["stages.reward.loss.margin=0.5", "stages.reward.loss.label_smoothing=0.1"],
            "pp2",
            2,
            marks=pytest.mark.slow,
        ),
        pytest.param([], "cp2.ring", 2, marks=pytest.mark.slow),
    ],
)
def test_layout_and_micro_batch_change_nothing(
    ranks: RankPool, tmp_path: Path, options: list[str], layout: str, world: int
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    common = [FP64, *options]
    ranks.run(run, recipe(one, "reward"), *common, "stages.reward.batch.micro_batch=4", world=1)
    cut = ["stages.reward.batch.micro_batch=1", f"engine.layout={layout}"]
    ranks.run(run, recipe(two, "reward"), *common, *cut, world=world)
    for kind in ("train", "validation"):
        for a, b in zip(rows(one, kind), rows(two, kind), strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"kind", "stage"}:
                assert b[name] == pytest.approx(a[name], rel=1e-9, abs=1e-9), name
    for name, value in weights(one, "reward").items():
        torch.testing.assert_close(weights(two, "reward")[name], value, rtol=1e-8, atol=1e-9)


def test_it_learns_and_says_how_well_calibrated_it_is(ranks: RankPool, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(8)]
    file.write_text("\n".join(json.dumps(x) for x in lines))
    config = recipe(tmp_path / "run", "reward")
    config["stages"][0]["data"] = {"sources": [{"kind": "preference-jsonl", "path": str(file)}]}
    config["stages"][0]["data"]["validation"] = config["stages"][0]["data"]["sources"]
    del config["stages"][0]["task"]
    ranks.run(run, config, "stages.reward.steps=20", world=1)
    first, last = rows(tmp_path / "run")[0], rows(tmp_path / "run")[-1]
    assert last["loss"] < 0.5 * first["loss"] and last["pair_accuracy"] == 1.0
    said = rows(tmp_path / "run", "validation")[-1]
    assert said["val_pair_accuracy"] == 1.0 and said["val_score_gap"] > 0.5
    # Always right, so the error is what its probabilities fall short of 1.
    assert 0.0 < said["val_calibration_error"] < 0.4


def test_it_starts_from_the_language_model_but_for_the_head(
    ranks: RankPool, tmp_path: Path
) -> None:
    """And what follows it starts from the language model again."""
    keys = ("lr=1e-30", "weight_decay=0.0")
    still = [f"stages.{s}.optimizer.{k}" for s in ("reward", "grpo") for k in keys]
    config = recipe(tmp_path / "run", "sft", "reward", "grpo")
    summary, _ = ranks.run(run, config, *still, world=2)
    sft, reward, grpo = (weights(tmp_path / "run", s) for s in ("sft", "reward", "grpo"))
    assert reward["model.head.weight"].shape == (1, 32)
    shared = [n for n in sft if n.startswith("model.") and n != "model.head.weight"]
    assert all(torch.equal(sft[n], reward[n]) and torch.equal(sft[n], grpo[n]) for n in shared)
    assert summary["stages"][2]["parent_hash"] == summary["stages"][0]["checkpoint_hash"]


@pytest.mark.slow
def test_killed_run_ends_like_an_unbroken_one(ranks: RankPool, tmp_path: Path) -> None:
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    ranks.run(run, recipe(clean, "reward"), world=2)
    ranks.run(run_and_die, recipe(broken, "reward"), "reward", 3, world=2)
    ranks.run(run, recipe(broken, "reward"), world=2)
    a, b = weights(clean, "reward"), weights(broken, "reward")
    assert all(torch.equal(a[n], b[n]) for n in a) and metrics(clean) == metrics(broken)


def test_transformers_gives_the_same_scores(ranks: RankPool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ranks.run(run, recipe(tmp_path / "run", "reward"), world=1)
    source = tmp_path / "run" / "stages" / "reward" / "checkpoints"
    convert(source, tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    opened = open_model(source)
    assert opened.config.head == "scalar"  # type: ignore[attr-defined]
    ours = registry.build(opened.config)
    load_weights(ours, opened.tensors)
    again = open_model(tmp_path / "hf")
    assert again.config == opened.config
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    task = CountLettersConfig.model_validate(TASK)
    made = made_rankings(tokenizer, task, 3, 5, "held_out", 4)
    for ranking in made:
        batch = collate_rankings([ranking], [0], tokenizer.pad_id, num_real=1)
        with torch.no_grad():
            out = ours(batch.input_ids_BT, batch.position_ids_BT, batch.segment_ids_BT)
            scores = selected_values(out, batch.loss_mask_BT)[batch.loss_mask_BT]
            for score, answer in zip(scores, ranking.answers, strict=True):
                found = theirs(input_ids=torch.tensor([[*ranking.prompt, *answer]])).logits
                assert float(found) == pytest.approx(float(score), abs=1e-5)


def test_preferences_from_a_file(ranks: RankPool, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": "a?", "chosen": "yes", "rejected": "no", "margin": 2.0},
        {"prompt": [{"role": "user", "content": "b?"}], "answers": ["x", "yy", "zzz"]},
        {"prompt": "c?", "answers": ["x", "y"], "ratings": [0.5, 1.5]},
    ]
    file.write_text("\n".join(json.dumps(x) for x in lines))
    config = recipe(tmp_path / "run", "reward")
    [stage] = config["stages"]
    del stage["task"]
    stage["data"] = {"sources": [{"kind": "preference-jsonl", "path": str(file)}]}
    ranks.run(run, config, world=1)
    assert checkpoint.latest(tmp_path / "run/stages/reward/checkpoints")
    file.write_text(json.dumps({"prompt": "a?", "chosen": "yes"}))
    config["run_dir"] = str(tmp_path / "other")
    with pytest.raises(RankError, match="line 1, byte 0: an answer is not a text"):
        ranks.run(run, config, world=1)
