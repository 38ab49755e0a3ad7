"""PPO does not depend on ranks, cuts, layouts or placements; resume is exact (traps 1, 11, 15)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from shardwise import checkpoint
from shardwise.checkpoint.convert import open_model
from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.rewards import Problem
from shardwise.stages.groups import Group
from shardwise.stages.ppo import PpoStage
from shardwise.stages.ppo_config import PpoConfig
from shardwise.stages.rollout_worker import RolloutWorker
from shardwise.stages.run import preflight
from shardwise.verify.pool import RankError
from tests.stages.recipes import KilledError, metrics, recipe, run, run_and_die, weights
from tests.support.daily import daily
from tests.support.pool import RankPool

FP64 = "engine.precision=fp64"


def ppo(folder: Path, *before: str, **roles: Any) -> dict[str, Any]:
    config = recipe(folder, *before, "ppo")
    config["stages"][-1]["roles"] = roles
    return config


def train_rows(folder: Path, stage: str = "ppo") -> list[dict[str, Any]]:
    return [r for r in metrics(folder) if r["kind"] == "train" and r["stage"] == stage]


def assert_same(one: Path, two: Path) -> None:
    for a, b in zip(train_rows(one), train_rows(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"kind", "stage"}:
            assert b[name] == pytest.approx(a[name], rel=1e-8, abs=1e-9), name
    a, b = weights(one, "ppo"), weights(two, "ppo")
    assert a.keys() == b.keys() and any(n.startswith("critic.model.") for n in a)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "options,layout",
    [
        pytest.param([], "dp2.zero2", marks=pytest.mark.slow),
        (["stages.ppo.batch.global_batch=6", "stages.ppo.loss.whiten_rewards=true"], "dp2.zero0"),
        pytest.param(
            ["stages.ppo.loss.objective=kl_penalty", "stages.ppo.loss.penalty_target=0.1"],
            "tp2.sp",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["stages.ppo.loss.aggregation=seq_mean_token_mean"], "cp2.ring", marks=pytest.mark.slow
        ),
    ],
)
def test_layout_and_micro_batch_change_nothing(
    ranks: RankPool, tmp_path: Path, options: list[str], layout: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    common = [FP64, *options]
    ranks.run(run, ppo(one), *common, "stages.ppo.batch.micro_batch=4", world=1)
    cut = ["stages.ppo.batch.micro_batch=1", f"engine.layout={layout}"]
    ranks.run(run, ppo(two), *common, *cut, world=2)
    assert_same(one, two)
    assert any(r["grad_norm"] > 0 for r in train_rows(one)), "it learnt something"


@pytest.mark.parametrize(
    "roles",
    [
        {"actor": {"ranks": [0]}, "critic": {"ranks": [1]}},
        pytest.param(
            {"actor": {"ranks": [1]}, "critic": {"engine": {"layout": "tp2"}}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "reference": {"ranks": [1]},
                "critic": {"ranks": [0], "engine": {"layout": "dp1.zero0"}},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["disjoint", "actor on one, critic on both", "frozen elsewhere"],
)
def test_placement_of_roles_changes_nothing(
    ranks: RankPool, tmp_path: Path, roles: dict[str, Any]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ranks.run(run, ppo(one), FP64, world=1)
    ranks.run(run, ppo(two, **roles), FP64, world=2)
    assert_same(one, two)
    # Evaluation and export find the actor, wherever it was.
    opened = open_model(two / "stages" / "ppo" / "checkpoints")
    assert opened.config.head == "vocabulary"  # type: ignore[attr-defined]


def kill_in_rollout(config: dict[str, Any], step: int, *overrides: str) -> None:
    """Die when a step's completions are written, before anything is learnt from them."""
    original, count = RolloutWorker.rollout, 0

    def rollout(self: RolloutWorker, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        found = original(self, *args, **kwargs)
        if count == step:
            raise KilledError
        count += 1
        return found

    with mock.patch.object(RolloutWorker, "rollout", rollout), pytest.raises(KilledError):
        run(config, *overrides)


@pytest.mark.parametrize("kind", daily(["ppo", "grpo"], 1))
def test_killed_run_ends_like_an_unbroken_one(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    """Between steps, and in the middle of a rollout."""
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    ranks.run(run, recipe(clean, kind), world=2)
    ranks.run(kill_in_rollout, recipe(broken, kind), 1, world=2)
    ranks.run(run_and_die, recipe(broken, kind), kind, 3, world=2)
    ranks.run(run, recipe(broken, kind), world=2)
    a, b = weights(clean, kind), weights(broken, kind)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert metrics(clean) == metrics(broken)
    if kind == "ppo":
        metas = [checkpoint.read_meta(d / "stages/ppo/checkpoints") for d in (clean, broken)]
        assert metas[0]["state"] == metas[1]["state"]
        assert metas[0]["state"]["kl"]["coef"] != 0.05, "the controller has moved"


@pytest.mark.slow
def test_a_run_goes_on_under_other_layouts_of_its_roles(ranks: RankPool, tmp_path: Path) -> None:
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    critic = {"optimizer": {"lr": 5e-3}}
    ranks.run(run, ppo(clean, critic=critic), FP64, world=2)
    ranks.run(run_and_die, ppo(broken, critic=critic), "ppo", 3, FP64, world=2)
    moved = ppo(broken, critic=critic | {"engine": {"layout": "dp1.zero0"}, "ranks": [1]})
    changes = [FP64, "engine.layout=tp2.sp", "stages.ppo.batch.micro_batch=1"]
    ranks.run(run, moved, *changes, world=2)
    assert_same(clean, broken)


@pytest.mark.slow
def test_actor_and_critic_learn_by_adapters_of_their_own(ranks: RankPool, tmp_path: Path) -> None:
    """On one rank, and on two that die and go on; a critic's head, which is new, is trained."""

    def config(folder: Path) -> dict[str, Any]:
        found = ppo(folder, critic={"adapter": {"kind": "dora", "rank": 4}})
        found["stages"][-1]["adapter"] = {"kind": "lora", "rank": 4}
        return found

    one, two = tmp_path / "one", tmp_path / "two"
    ranks.run(run, config(one), FP64, world=1)
    cut = [FP64, "engine.layout=tp2.sp"]
    ranks.run(run_and_die, config(two), "ppo", 3, *cut, world=2)
    ranks.run(run, config(two), *cut, world=2)
    assert_same(one, two)
    held = {n.removeprefix("critic.model.") for n in weights(one, "ppo") if "critic.model" in n}
    assert {n for n in held if ".adapter." not in n} == {"head.weight"}
    with pytest.raises(ConfigError, match=r"roles\.reference\.adapter: a critic alone has one"):
        bad = ppo(one, reference={"adapter": {"kind": "lora"}})
        preflight(load_config(bad).config, 1)
    beyond = r"stages\.0\.roles\.critic\.adapter\.rank: 64 is beyond"
    with pytest.raises(ConfigError, match=beyond):
        bad = ppo(one, critic={"adapter": {"kind": "lora", "rank": 64}})
        preflight(load_config(bad).config, 1)


def test_dropout_is_off_and_the_first_ratio_is_one(ranks: RankPool, tmp_path: Path) -> None:
    """Trap 11 with a model that has dropout."""
    config = ppo(tmp_path / "run")
    config["model"] |= {"dropout": 0.2}
    once = ["stages.ppo.updates_per_rollout=1", "stages.ppo.epochs_per_rollout=1"]
    ranks.run(run, config, *once, world=1)
    assert all(r["ratio_mean"] == 1.0 for r in train_rows(tmp_path / "run"))


def test_a_score_that_is_no_number_is_unscorable() -> None:
    stage = PpoStage.__new__(PpoStage)
    stage.config = PpoConfig.model_validate(
        {"kind": "ppo", "steps": 1, "verifier_weight": 0.0, "reward_model_weight": 1.0}
    )
    scores = [math.nan, 0.5, math.inf]
    group = Group(
        Problem("", "", "", {}), 0, [1], [[2]] * 3, [[0.0]] * 3, [True] * 3, [""] * 3,
        [None] * 3, "", {"model_score": scores},
    )  # fmt: skip
    stage._score(group)
    assert group.rewards == [None, 0.5, None]


def test_critic_starts_from_the_reward_model_and_scores_come_from_it(
    ranks: RankPool, tmp_path: Path
) -> None:
    keys = ("optimizer.lr=1e-30", "optimizer.weight_decay=0.0")
    still = [f"stages.ppo.{k}" for k in keys]
    mixed = ["stages.ppo.reward_model_weight=2.0", "stages.ppo.verifier_weight=0.5"]
    summary, _ = ranks.run(run, ppo(tmp_path / "run", "sft", "reward"), *still, *mixed, world=2)
    sft, reward, last = (weights(tmp_path / "run", s) for s in ("sft", "reward", "ppo"))
    for name in (n for n in reward if n.startswith("model.")):
        assert torch.equal(last[f"critic.{name}"], reward[name]), name
    for name in (n for n in sft if n.startswith("model.")):
        assert torch.equal(last[name], sft[name]), name
    assert summary["stages"][2]["parent_hash"] == summary["stages"][0]["checkpoint_hash"]
    for row in records(tmp_path / "run", 1):
        stopped = 0.0 if row["stopped"] else 0.5
        expected = 2.0 * row["model_score"] + 0.5 * row["verifier"] - stopped
        assert row["reward"] == pytest.approx(expected, rel=1e-6)


def records(folder: Path, step: int) -> list[dict[str, Any]]:
    file = folder / "rollouts" / "ppo" / f"step_{step:08d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("sampling", [[], ["temperature=0.6", "top_p=0.8"]], ids=["plain", "cut"])
def test_the_first_update_is_on_policy_and_the_kl_starts_at_zero(
    ranks: RankPool, tmp_path: Path, sampling: list[str]
) -> None:
    once = ["stages.ppo.updates_per_rollout=1", "stages.ppo.epochs_per_rollout=1"]
    once += [f"stages.ppo.sampling.{s}" for s in sampling]
    ranks.run(run, ppo(tmp_path / "run"), *once, world=1)
    rows = train_rows(tmp_path / "run")
    assert all(r["ratio_mean"] == 1.0 and r["clip_fraction"] == 0.0 for r in rows)
    assert rows[0]["kl_response"] == 0.0 and rows[-1]["kl_response"] != 0.0
    for row in records(tmp_path / "run", 0):
        assert row["old_logprob"] == pytest.approx(row["logprobs"], abs=1e-5)
        assert len(row["return"]) == len(row["value"]) == len(row["tokens"])


def test_what_cannot_be_is_refused_with_a_mend(ranks: RankPool, tmp_path: Path) -> None:
    for roles, words in (
        ({"critic": {"ranks": [1]}}, "start 2"),
        ({"reward": {"init_from": "nowhere"}}, "neither an earlier stage"),
        ({"critic": {"engine": {"layout": "tp3"}}}, "tp3"),
    ):
        with pytest.raises(RankError, match=words):
            config = ppo(tmp_path / "run", **roles)
            ranks.run(run, config, "stages.ppo.reward_model_weight=1.0", world=1)
    with pytest.raises(RankError, match="add one of kind reward"):
        ranks.run(run, ppo(tmp_path / "run"), "stages.ppo.reward_model_weight=1.0", world=1)
    with pytest.raises(RankError, match="holds a language model, no reward model"):
        config = ppo(tmp_path / "two", "sft", reward={"init_from": "sft"})
        ranks.run(run, config, "stages.ppo.reward_model_weight=1.0", world=1)
    with pytest.raises(RankError, match="same number of prompts"):
        ranks.run(run, ppo(tmp_path / "run"), "stages.ppo.batch.ramp_start=2", world=1)
    with pytest.raises(RankError, match="must divide"):
        ranks.run(run, ppo(tmp_path / "run"), "stages.ppo.updates_per_rollout=3", world=1)
