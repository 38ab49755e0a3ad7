"""GRPO's step does not depend on ranks, micro-batches or mini-batch cuts; traps 8, 11, 13."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from shardwise import checkpoint
from shardwise.rewards.user import UserRewardConfig
from shardwise.stages.grpo import GrpoStage
from tests.stages.recipes import metrics, recipe, run, run_and_die, weights
from tests.support.daily import daily
from tests.support.pool import RankPool

FP64 = "engine.precision=fp64"
IGNORED = {"grad_norm"}


def train_rows(folder: Path) -> list[dict[str, Any]]:
    return [r for r in metrics(folder) if r["kind"] == "train"]


@pytest.mark.parametrize(
    "options",
    daily(
        [
            [],
            ["stages.grpo.loss.preset=dr_grpo"],
            ["stages.grpo.loss.advantage=reinforce_pp"],
            ["stages.grpo.updates_per_rollout=2", "stages.grpo.epochs_per_rollout=2"],
            ["stages.grpo.loss.preset=grpo_deepseekmath"],
            ["stages.grpo.batch.global_batch=3", "stages.grpo.sampling.top_p=0.6"],
        ],
        5,
    ),
)
def test_layout_and_micro_batch_change_nothing(
    ranks: RankPool, tmp_path: Path, options: list[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    common = [FP64, *options]
    ranks.run(run, recipe(one, "grpo"), *common, "stages.grpo.batch.micro_batch=4", world=1)
    ranks.run(run, recipe(two, "grpo"), *common, "stages.grpo.batch.micro_batch=1", world=2)
    for a, b in zip(train_rows(one), train_rows(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"kind", "stage"}:
            assert b[name] == pytest.approx(a[name], rel=1e-9, abs=1e-9), name
    for name, value in weights(one, "grpo").items():
        torch.testing.assert_close(weights(two, "grpo")[name], value, rtol=1e-8, atol=1e-9)
    assert any(row["degenerate_fraction"] < 1 for row in train_rows(one)), "it learnt something"


def records(folder: Path, step: int) -> list[dict[str, Any]]:
    files = sorted((folder / "rollouts" / "grpo").glob(f"step_{step:08d}.*"))
    rows = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    return sorted(rows, key=lambda r: (r["prompt_id"], r["sample_id"]))


def test_rollouts_are_the_same_on_any_number_of_ranks(ranks: RankPool, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ranks.run(run, recipe(one, "grpo"), FP64, world=1)
    ranks.run(run, recipe(two, "grpo"), FP64, world=2)
    a, b = records(one, 0), records(two, 0)
    assert len(a) == 16
    for x, y in zip(a, b, strict=True):
        assert x["tokens"] == y["tokens"]
        assert x["advantage"] == pytest.approx(y["advantage"])
        assert x["policy"] == y["policy"], "both serve the same weights, by checksum"
    assert a[0]["policy"] != records(one, 1)[0]["policy"], "weights moved between steps"


@pytest.mark.parametrize(
    "sampling", [[], ["temperature=0.6", "top_k=7", "top_p=0.9"]], ids=["plain", "cut"]
)
def test_the_first_update_is_on_policy(
    ranks: RankPool, tmp_path: Path, sampling: list[str]
) -> None:
    """Ratio exactly 1, no clipping; sampler and trainer agree on log-probabilities (trap 5)."""
    options = ["stages.grpo.loss.importance_cap=2.0", "engine.precision=fp32"]
    options += [f"stages.grpo.sampling.{s}" for s in sampling]
    ranks.run(run, recipe(tmp_path / "run", "grpo"), *options, world=1)
    for row in train_rows(tmp_path / "run"):
        assert row["ratio_mean"] == 1.0 and row["clip_fraction"] == 0.0
        assert row["importance_mean"] == pytest.approx(1.0, abs=1e-5)
    for row in records(tmp_path / "run", 0):
        assert ("kept" in row) == bool(sampling)
        if sampling:  # renormalised: of 7 words, where the whole vocabulary has hundreds
            assert all(t in k for t, k in zip(row["tokens"], row["kept"], strict=True))
            assert max(map(len, row["kept"])) <= 7 and min(row["logprobs"]) > -4.0


def test_kl_to_the_reference_starts_at_zero_and_survives_resume(
    ranks: RankPool, tmp_path: Path
) -> None:
    options = ["stages.grpo.loss.kl=k3", "stages.grpo.loss.kl_coef=0.1", FP64]
    ranks.run(run, recipe(tmp_path / "run", "grpo"), *options, world=1)
    kl = [row["kl"] for row in train_rows(tmp_path / "run")]
    assert kl[0] == pytest.approx(0.0, abs=1e-15) and kl[-1] > 1e-12
    broken = recipe(tmp_path / "broken", "grpo")
    ranks.run(run_and_die, broken, "grpo", 3, *options, world=1)
    ranks.run(run, broken, *options, world=1)
    assert [row["kl"] for row in train_rows(tmp_path / "broken")] == kl


def unscorable(config: dict[str, Any], absent: bool, *overrides: str) -> None:
    """The first completion of every group cannot be scored, or was never written."""
    original = GrpoStage._add_advantages

    def add(self: GrpoStage, groups: Any) -> dict[str, float]:
        for group in groups:
            group.rewards[0] = None
            for name in ("tokens", "logprobs", "stopped", "texts", "rewards", "reasons"):
                setattr(group, name, getattr(group, name)[absent:])
        return original(self, groups)

    with mock.patch.object(GrpoStage, "_add_advantages", add):
        run(config, *overrides)


def test_unscorable_completions_are_left_out_not_scored_zero(
    ranks: RankPool, tmp_path: Path
) -> None:
    for absent in (False, True):
        folder = tmp_path / ("absent" if absent else "run")
        ranks.run(unscorable, recipe(folder, "grpo"), absent, FP64, world=1)
    a, b = (weights(tmp_path / name, "grpo") for name in ("run", "absent"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-9, atol=1e-12)
    rows = train_rows(tmp_path / "run")
    assert all(r["unscorable_fraction"] == pytest.approx(0.25) for r in rows)
    for record in records(tmp_path / "run", 0):
        if record["sample_id"] == 0:
            assert record["reward"] is None and record["advantage"] == 0.0
            assert not any(record["mask"])
        else:
            assert all(record["mask"])
    assert all(r["reward_mean"] is not None for r in rows)


def test_a_users_reward_by_path_and_name(ranks: RankPool, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(question, completion, answer, meta):\n    return 0.5\n")
    part = {"kind": "user", "function": f"{file}:score"}
    assert UserRewardConfig.model_validate(part)
    config = recipe(tmp_path / "run", "grpo")
    config["stages"][0]["reward"] = {"parts": [part]}
    ranks.run(run, config, world=1)
    assert all(r["reward_mean"] == 0.5 for r in train_rows(tmp_path / "run"))
    assert all(r["degenerate_fraction"] == 1.0 for r in train_rows(tmp_path / "run"))
    before = dict(checkpoint.read_tensors(tmp_path / "run/stages/grpo/checkpoints"))
    assert all(torch.isfinite(t).all() for t in before.values())
