"""A stage that trained next to nothing is not done; what is not finite is not kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from shardwise import checkpoint
from shardwise.engines.native import NativeEngine
from shardwise.errors import DivergedError
from shardwise.stages.skipped import SkippedError, counted, too_many
from tests.stages.recipes import metrics, overflowing, recipe, run, weights
from tests.support.daily import daily
from tests.support.pool import RankPool


def test_the_worst_role_counts() -> None:
    meta = {
        "engine": {"updates": 4, "skipped": 1},
        "roles": {"critic": {"updates": 8, "skipped": 5}, "old": {"updates": 3}},
    }
    assert counted(meta) == {"updates": 8, "skipped": 5}
    assert counted({}) == {"updates": 0, "skipped": 0}
    assert too_many(counted(meta), 0.5) and not too_many(counted(meta), 1.0)
    assert not too_many({"updates": 8, "skipped": 4}, 0.5) and not too_many({}, 0.0)


def outcome(config: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """The summary of a run most of whose updates overflow."""
    try:
        with overflowing(after=1):
            return run(config, *overrides)
    except SkippedError as error:
        assert error.exit_code == 4
        return error.summary | {"error": str(error)}


def longer(folder: Path, *kinds: str) -> dict[str, Any]:
    config = recipe(folder, *kinds)
    config["stages"][0]["steps"] = 5
    return config


def test_a_stage_that_skipped_most_updates_is_not_done(ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = longer(folder, "pretrain", "sft")
    for _ in range(2):  # started again it says the same, and trains nothing
        [summary] = ranks.run(outcome, config, world=1)
        assert "stage pretrain: 4 of 5 updates were skipped" in summary["error"]
        assert summary["stopped"] == summary["error"]
        assert summary["skipped_updates"] == {"pretrain": 4}
        assert [(s["updates"], s["skipped"]) for s in summary["stages"]] == [(5, 4)]
    events = [r for r in metrics(folder) if r.get("event") == "mostly_skipped"]
    assert [(e["step"], e["skipped"]) for e in events] == [(5, 4)]
    assert not (folder / "stages" / "sft").exists()
    taken = longer(tmp_path / "other", "sft") | {"init_from": str(folder / "stages/pretrain")}
    taken["init_from"] += "/checkpoints"
    with pytest.raises(Exception, match=r"init_from.*: 4 of 5 updates were skipped"):
        ranks.run(outcome, taken, world=1)
    assert not (tmp_path / "other" / "stages").exists()
    [summary] = ranks.run(outcome, config, "stages.pretrain.max_skipped=1", world=1)
    assert [s["name"] for s in summary["stages"]] == ["pretrain", "sft"]
    assert "stage sft" in summary["error"]


def poisoned(config: dict[str, Any], name: str, *overrides: str) -> list[str]:
    """A value of ``name`` becomes NaN on one rank after the fourth update; what was said of it."""
    original = NativeEngine.step

    def step(self: NativeEngine, lr: float) -> float:
        norm = original(self, lr)
        tensor = self.state_dict().tensors[name]
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if self.updates == 4 and self.data_rank == self.data_size - 1:
            local.view(-1)[-1] = math.nan
        return norm

    with mock.patch.object(NativeEngine, "step", step):
        try:
            run(config, *overrides)
        except DivergedError as error:
            assert error.exit_code == 3
            return [str(error)]
    return []


@pytest.mark.parametrize(
    "name",
    daily(["model.embed.weight", "optim.embed.weight.exp_avg_sq", "optim.norm.weight.exp_avg"], 2),
)
def test_a_bad_value_ends_the_run_at_the_save(ranks: RankPool, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    config = recipe(folder, "pretrain")
    behind = f"stages.0.checkpoint.asynchronous={'norm' in name}".lower()
    options = (behind, "stages.0.checkpoint.keep=1", "engine.layout=dp2.zero1")
    told = ranks.run(poisoned, config, name, *options, world=2)
    assert told[0] == told[1]
    [message] = told[0]
    assert name in message and "nothing was saved" in message
    assert "last good checkpoint is" in message and "step_00000002" in message
    root = folder / "stages" / "pretrain" / "checkpoints"
    assert checkpoint.list_steps(root) == [2]
    clean = tmp_path / "clean"
    ranks.run(run, config, *options, world=2)
    ranks.run(run, recipe(clean, "pretrain"), *options, world=2)
    a, b = weights(folder, "pretrain"), weights(clean, "pretrain")
    assert all(a[n].equal(b[n]) for n in a)
