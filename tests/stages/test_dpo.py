"""DPO and KTO learn preferences, the same on every layout, and hold them against what stays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise import checkpoint
from shardwise.config.load import load_config
from shardwise.data.preferences import Ranking
from shardwise.errors import ConfigError
from shardwise.stages.dpo import labelled, mismatched
from shardwise.stages.reference import FOLDER
from shardwise.verify.pool import RankError
from tests.stages.recipes import metrics, recipe, run, run_and_die, weights
from tests.support.daily import daily
from tests.support.pool import RankPool

FP64 = "engine.precision=fp64"
KTO = {"kind": "kto", "beta": 1.0, "undesirable_weight": 0.5}


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [r for r in metrics(folder) if r["kind"] == kind]


@pytest.mark.parametrize(
    ("loss", "layout"),
    daily([({"sft_weight": 0.3, "ld_alpha": 0.5}, "dp2.zero2"), (KTO, "dp2.zero3")], 1),
)
def test_layout_and_micro_batch_change_nothing(
    ranks: RankPool, tmp_path: Path, loss: dict[str, Any], layout: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    configs = [recipe(folder, "dpo") for folder in (one, two)]
    for config in configs:
        config["stages"][0]["loss"] = loss
    # Three rankings do not share evenly between two ranks.
    common = [FP64, "stages.dpo.batch.global_batch=3"]
    ranks.run(run, configs[0], *common, "stages.dpo.batch.micro_batch=4", world=1)
    cut = ["stages.dpo.batch.micro_batch=1", f"engine.layout={layout}"]
    ranks.run(run, configs[1], *common, *cut, world=2)
    for kind in ("train", "validation"):
        for a, b in zip(rows(one, kind), rows(two, kind), strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"kind", "stage"}:
                assert b[name] == pytest.approx(a[name], rel=1e-9, abs=1e-9), name
    for name, value in weights(one, "dpo").items():
        torch.testing.assert_close(weights(two, "dpo")[name], value, rtol=1e-8, atol=1e-9)


def pairs_in(folder: Path, *lines: dict[str, Any], **data: Any) -> dict[str, Any]:
    """A recipe's data section over these rows."""
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    source = {"kind": "preference-jsonl", "path": str(file)}
    return {"sources": [source], "validation": [source], **data}


def on_files(folder: Path, data: dict[str, Any], **stage: Any) -> dict[str, Any]:
    config = recipe(folder, "dpo")
    config["stages"][0] |= {"data": data, "task": None, **stage}
    return config


@pytest.mark.parametrize("loss", [{"beta": 0.5}, {**KTO, "undesirable_weight": 1.0}])
def test_it_learns(ranks: RankPool, tmp_path: Path, loss: dict[str, Any]) -> None:
    lines = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(8)]
    data = pairs_in(tmp_path, *lines)
    start = "stages.dpo.validation.at_start=true"
    ranks.run(
        run, on_files(tmp_path / "run", data, loss=loss), "stages.dpo.steps=20", start, world=1
    )
    first, last = rows(tmp_path / "run")[0], rows(tmp_path / "run")[-1]
    if loss.get("kind") != "kto":
        assert first["loss"] == pytest.approx(math.log(2)) and last["pair_accuracy"] == 1.0
    # The policy was its reference.
    names = ("margin", "drift_chosen", "drift_rejected", "rewards_chosen")
    assert all(abs(first[name]) < 1e-5 for name in names)
    assert last["loss"] < 0.5 * first["loss"] and last["margin"] > 1.0
    assert last["drift_chosen"] > last["drift_rejected"]
    before, *_, said = rows(tmp_path / "run", "validation")
    assert before["step"] == 0 and before["val_margin"] == 0.0
    assert said["val_margin"] > 1.0 and said["val_loss"] < 0.5 * first["loss"]


def test_stored_log_probabilities_are_those_of_the_frozen_copy(
    ranks: RankPool, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("asked", "stored")]
    ranks.run(run, recipe(folders[0], "dpo"), FP64, world=1)
    stored = "stages.dpo.reference=precomputed"
    ranks.run(run_and_die, recipe(folders[1], "dpo"), "dpo", 3, FP64, stored, world=1)
    [file] = (folders[1] / FOLDER).iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # damage is seen by its hash, and the reference asked again
    file.write_bytes(data)
    ranks.run(run, recipe(folders[1], "dpo"), FP64, stored, world=1)
    for name, value in weights(folders[0], "dpo").items():
        torch.testing.assert_close(weights(folders[1], "dpo")[name], value, rtol=1e-8, atol=1e-9)
    assert bytes(data) != file.read_bytes()
    losses = [[r["loss"] for r in rows(folder)] for folder in folders]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


@pytest.mark.slow
def test_killed_run_ends_like_an_unbroken_one(ranks: RankPool, tmp_path: Path) -> None:
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    start = "stages.dpo.validation.at_start=true"
    ranks.run(run, recipe(clean, "sft", "dpo"), start, world=2)
    ranks.run(run_and_die, recipe(broken, "sft", "dpo"), "dpo", 3, start, world=2)
    ranks.run(run, recipe(broken, "sft", "dpo"), start, world=2)
    a, b = weights(clean, "dpo"), weights(broken, "dpo")
    assert all(torch.equal(a[n], b[n]) for n in a) and metrics(clean) == metrics(broken)


def test_a_loss_without_a_reference_has_no_such_model(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "dpo")
    config["stages"][0]["loss"] = {"preset": "simpo_llama3"}
    assert load_config(config).config.stages[0].unused_roles == {"reference"}
    ranks.run(run, config, world=1)
    assert "logps_chosen" in rows(tmp_path / "run")[0]
    assert "drift_chosen" not in rows(tmp_path / "run")[0]


def test_unpaired_rows_and_cut_prompts(
    ranks: RankPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        {"prompt": "a long question " * i, "completion": "yes" if i % 2 else "no",
         "label": bool(i % 2)} for i in range(1, 7)
    ]  # fmt: skip
    data = pairs_in(tmp_path, *lines, max_prompt_length=24, texts="raw")
    ranks.run(run, on_files(tmp_path / "run", data, loss=KTO), world=1)
    assert checkpoint.latest(tmp_path / "run/stages/dpo/checkpoints")
    assert all("val_margin" in r for r in rows(tmp_path / "run", "validation"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "a?", "chosen": "yes", "rejected": "yes"}, "line 1, .*the same tokens"),
        ({"prompt": "a?", "completion": "yes", "label": True}, "loss.kind kto"),
        ({"prompt": "a?", "chosen": "y" * 200, "rejected": "n"}, "batch.seq_len is 96; raise it"),
    ],
)
def test_rows_that_teach_nothing_are_refused(
    ranks: RankPool, tmp_path: Path, line: dict[str, Any], words: str
) -> None:
    with pytest.raises(RankError, match=words):
        ranks.run(run, on_files(tmp_path / "run", pairs_in(tmp_path, line)), world=1)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"loss": {"kind": "simpo"}, "reference": "model"}, "simpo compares with no reference"),
        ({"loss": KTO, "reference": "precomputed"}, "mismatched answers"),
        ({"loss": KTO, "batch": {"global_batch": 1}}, "2 rows or more"),
        ({"loss": {"kind": "simpo", "ld_alpha": 0.5}}, "ld_alpha.*unknown key"),
        ({"loss": {"kind": "dpoo"}}, "loss.kind"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, stage: dict[str, Any], words: str
) -> None:
    config = recipe(tmp_path / "run", "dpo")
    config["stages"][0] |= stage
    with pytest.raises(ConfigError, match=words):
        load_config(config)


def test_mismatched_answers_and_labels() -> None:
    some = [Ranking([i] * 6, [[10 + i] * (1 + i), [20 + i]], [2.0, 1.0]) for i in range(3)]
    found = mismatched(some, 8)
    assert [r.answers for r in found] == [some[2].answers, some[0].answers, some[1].answers]
    assert [len(r.prompt) for r in found] == [5, 6, 6] and all(r.longest <= 8 for r in found)
    assert [r.prompt[0] for r in found] == [0, 1, 2]
    assert labelled(some[0]).ratings == [1.0, 0.0]
    assert labelled(Ranking([1], [[2]], [1.0])).ratings == [1.0]
    assert labelled(Ranking([1], [[2]], [0.0])).ratings == [0.0]
