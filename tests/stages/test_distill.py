"""A student learns from a teacher, on given texts and its own, the same on every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.stages.run import preflight
from shardwise.verify.pool import RankError
from tests.stages.recipes import metrics, recipe, run, run_and_die, weights
from tests.support.daily import daily
from tests.support.pool import RankPool

FP64 = "engine.precision=fp64"


def taught(folder: Path, **keys: Any) -> dict[str, Any]:
    """The student goes on from pre-training, its teacher is what fine-tuning made of it."""
    config = recipe(folder, "pretrain", "sft", "distill")
    pretrain, sft, distill = config["stages"]
    pretrain["steps"] = 1
    sft["optimizer"] = {"lr": 3e-2}
    distill |= {"start_from": "pretrain", "roles": {"teacher": {"init_from": "sft"}}, **keys}
    return config


def rows(folder: Path) -> list[dict[str, Any]]:
    return [r for r in metrics(folder) if r["stage"] == "distill" and r["kind"] == "train"]


@pytest.mark.parametrize(
    ("layout", "teacher"),
    daily(
        [
            ("dp2.zero2", {}),
            ("tp2", {"engine": {"layout": "dp2.zero3"}}),
            ("pp2", {}),
            ("dp2.zero1", {"ranks": [1], "engine": {"layout": "dp1"}}),
        ],
        1,
    ),
)
def test_layout_and_micro_batch_change_nothing(
    ranks: RankPool, tmp_path: Path, layout: str, teacher: dict[str, Any]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ranks.run(run, taught(one), FP64, world=1)
    config = taught(two)
    config["stages"][2] |= {
        "engine": {"layout": layout},
        "roles": {"teacher": {"init_from": "sft", **teacher}},
    }
    ranks.run(run, config, FP64, "stages.distill.batch.micro_batch=1", world=2)
    assert [r["own_texts"] for r in rows(one)] == [0.0, 1.0, 0.0, 1.0]
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"kind", "stage"}:
            assert b[name] == pytest.approx(a[name], rel=1e-8, abs=1e-9), name
    for name, value in weights(one, "distill").items():
        torch.testing.assert_close(weights(two, "distill")[name], value, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("loss", [{"kind": "forward_kl"}, {"kind": "reverse_kl", "top_k": None}])
def test_a_student_comes_near_its_teacher(
    ranks: RankPool, tmp_path: Path, loss: dict[str, Any]
) -> None:
    config = taught(tmp_path / "run", loss=loss, on_policy_fraction=0.0, steps=30)
    ranks.run(run, config, world=1)
    first, last = rows(tmp_path / "run")[0], rows(tmp_path / "run")[-1]
    assert last["loss"] < 0.3 * first["loss"]


@pytest.mark.slow
def test_killed_run_ends_like_an_unbroken_one(ranks: RankPool, tmp_path: Path) -> None:
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    ranks.run(run, taught(clean), world=2)
    ranks.run(run_and_die, taught(broken), "distill", 3, world=2)
    ranks.run(run, taught(broken), world=2)
    a, b = weights(clean, "distill"), weights(broken, "distill")
    assert all(torch.equal(a[n], b[n]) for n in a) and rows(clean) == rows(broken)


def test_held_out_texts_are_measured(ranks: RankPool, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]
             for i in range(8)]  # fmt: skip
    file.write_text("\n".join(json.dumps({"messages": t}) for t in turns))
    config = taught(tmp_path / "run", on_policy_fraction=0.0, steps=2)
    del config["stages"][2]["task"]
    source = {"kind": "messages", "path": str(file)}
    config["stages"][2]["data"] = {"sources": [source], "validation": [source], "pack": False}
    ranks.run(run, config, "stages.distill.optimizer.lr=1e-30", world=2)
    [said] = [r for r in metrics(tmp_path / "run")
              if r["kind"] == "validation" and r["stage"] == "distill"][-1:]  # fmt: skip
    trained = [r["loss"] for r in rows(tmp_path / "run")]
    assert min(trained) <= said["val_loss"] <= max(trained) or len(set(trained)) == 1


def test_another_vocabulary_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    other = recipe(tmp_path / "other", "pretrain")
    other["stages"][0]["steps"] = 1
    other["tokenizer"] = {"kind": "bpe", "vocab_size": 290}
    ranks.run(run, other, world=1)
    theirs = str(tmp_path / "other" / "stages" / "pretrain" / "checkpoints")
    config = recipe(tmp_path / "run", "distill", tokenizer={"kind": "bpe", "vocab_size": 300})
    config["stages"][0] |= {"roles": {"teacher": {"init_from": theirs}}}
    config["tokenizer"] = {"kind": "bytes"}
    with pytest.raises(RankError, match=r"that model reads a vocabulary of|has another vocabulary"):
        ranks.run(run, config, world=1)


def test_what_cannot_be_learnt_from_is_refused(tmp_path: Path) -> None:
    config = taught(tmp_path / "run", roles={})
    with pytest.raises(ConfigError, match=r"teacher.init_from.*whom to learn from is not said"):
        preflight(load_config(config).config, 1)
    config = taught(tmp_path / "run", task=None, data={"sources": [{"path": "a.jsonl"}]})
    with pytest.raises(ConfigError, match="writes to a task's problems"):
        load_config(config)
