"""More steps for a stage that runs or is finished; fewer than it has done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.stages.run import preflight
from tests.stages.recipes import metrics, recipe, run, run_and_die, weights
from tests.support.daily import daily
from tests.support.pool import RankPool


def of(folder: Path, kind: str, steps: int, **stage: Any) -> dict[str, Any]:
    config = recipe(folder, kind)
    config["model"]["dropout"] = 0.1
    config["stages"][0] |= {"steps": steps, "validation": {"every": 2}} | stage
    return config


def trained(folder: Path) -> list[dict[str, Any]]:
    return [r for r in metrics(folder) if r["kind"] == "train"]


@pytest.mark.parametrize("kind", daily(["pretrain", "grpo"], 0))
def test_a_lengthened_run_is_an_unbroken_longer_one(
    ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    """Same samples, same weights, bit for bit: where the schedule does not know the length."""
    settings: dict[str, Any] = {"schedule": {"kind": "constant", "warmup_steps": 3}}
    if kind == "pretrain":  # and a batch that still grows
        settings["batch"] = {
            "global_batch": 6, "micro_batch": 2, "seq_len": 16, "ramp_start": 2, "ramp_steps": 3,
        }  # fmt: skip
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    ranks.run(run, of(longer, kind, 3, **settings), world=2)  # finished
    ranks.run(run_and_die, of(longer, kind, 5, **settings), kind, 4, world=2)  # running
    ranks.run(run, of(longer, kind, 6, **settings), world=2)
    [summary, _] = ranks.run(run, of(whole, kind, 6, **settings), world=2)
    a, b = weights(longer, kind), weights(whole, kind)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert trained(longer) == trained(whole)
    result = json.loads((longer / "stages" / kind / "result.json").read_text())
    assert (result["steps"], result["tokens"]) == (6, summary["stages"][0]["tokens"])
    assert result["checkpoint"].endswith("step_00000006")


def test_a_decay_goes_on_as_the_longer_one_and_says_so(ranks: RankPool, tmp_path: Path) -> None:
    settings = {"schedule": {"kind": "linear"}}
    ranks.run(run, of(tmp_path / "longer", "pretrain", 3, **settings), world=1)
    ranks.run(run, of(tmp_path / "longer", "pretrain", 6, **settings), world=1)
    ranks.run(run, of(tmp_path / "whole", "pretrain", 6, **settings), world=1)
    longer, whole = trained(tmp_path / "longer"), trained(tmp_path / "whole")
    for key in ("samples", "tokens"):
        assert [r[key] for r in longer] == [r[key] for r in whole]
    assert [r["lr"] for r in longer[3:]] == [r["lr"] for r in whole[3:]]
    assert longer[2]["lr"] < longer[3]["lr"]
    notes = [json.loads(x) for x in (tmp_path / "longer/notes.jsonl").read_text().splitlines()]
    [note] = [n for n in notes if n["event"] == "lengthened"]
    assert "6 steps instead of 3: the next learning rate is 0.005, where" in note["message"]
    assert "was 0.00333" in note["message"]


def test_what_cannot_be_is_told_before_anything_starts(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain", "sft")
    ranks.run(run, config, world=1)

    def refused(*overrides: str) -> str:
        loaded = load_config(config, overrides)
        with pytest.raises(ConfigError) as caught:
            preflight(loaded.config, 1, loaded.provenance)
        return str(caught.value)

    said = refused("stages.sft.steps=3")
    assert "stages.1.steps (command line override 1): 3, but stage sft has done 4" in said
    assert "give 4 or more" in said
    said = refused("stages.pretrain.steps=9")
    assert "stages.0.steps" in said and "stage sft was trained from the checkpoint" in said
    more = load_config(config, ["stages.sft.steps=9"])
    preflight(more.config, 1, more.provenance)


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["schedule.warmup_steps=5"], "schedule.warmup_steps", "end at 80% of optimizer.lr"),
        (
            ["schedule.kind=wsd", "schedule.warmup_steps=2", "schedule.decay_steps=3"],
            "schedule.decay_steps",
            "warmup_steps 2 + decay_steps 3 are more than the stage's 4",
        ),
        (["schedule.kind=wsd"], "schedule", "needs decay_steps"),
        (["schedule.kind=cosine_restarts"], "schedule", "needs cycle_steps"),
        (
            ["schedule.kind=cosine_restarts", "schedule.cycle_steps=5"],
            "schedule.cycle_steps",
            "not one cycle would end",
        ),
        (
            [
                "schedule.kind=cosine_restarts",
                "schedule.cycle_steps=2",
                "schedule.cycle_factor=0.5",
            ],
            "schedule",
            "may not shrink",
        ),
        (["batch.ramp_start=1", "batch.ramp_steps=5"], "batch.ramp_steps", "never comes to"),
        (["critic_warmup_steps=4"], "critic_warmup_steps", "actor would never be trained"),
    ],
)
def test_schedules_that_do_not_fit_are_refused_with_their_key(
    tmp_path: Path, overrides: list[str], key: str, words: str
) -> None:
    kind = "ppo" if "critic" in overrides[0] else "pretrain"
    config = recipe(tmp_path / "run", kind)
    with pytest.raises(ConfigError) as caught:
        load_config(config, [f"stages.0.{o}" for o in overrides])
    assert f"stages.0.{key} (" in str(caught.value) and words in str(caught.value)
