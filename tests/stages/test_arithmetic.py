"""The screen before the first step: every number by hand."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.models.common.config import DecoderConfig
from shardwise.stages.arithmetic import arithmetic, bytes_a_rank, role_numbers, roles_in_use
from tests.stages.recipes import recipe


def stage_of(tmp_path: Any, kind: str, **changes: Any) -> tuple[Any, Any]:
    config = recipe(tmp_path / "run", "reward", kind)
    config["stages"][-1] |= {"updates_per_rollout": 2, "epochs_per_rollout": 3, **changes}
    config["model"]["vocab_size"] = 300
    run = load_config(config).config
    return run, run.stages[-1]


def test_numbers_of_ppo(tmp_path: Any) -> None:
    roles = {"critic": {"ranks": [2, 3], "engine": {"layout": "tp2"}}, "actor": {"ranks": [0, 1]}}
    run, stage = stage_of(tmp_path, "ppo", roles=roles, reward_model_weight=1.0)
    text = arithmetic(run, stage, 4, 100)
    assert "4 prompts x 3 samples = 12 completions of at most 4 tokens (48)" in text
    assert "2 mini-batches of 2 prompts (6 completions) x 3 epochs = 6" in text
    assert "48 completions, 24 updates, 0.80 times through 20 problems" in text
    assert roles_in_use(stage) == ["actor", "reference", "reward", "critic"]
    actor, critic = (role_numbers(run, stage, r, 4, 100) for r in ("actor", "critic"))
    assert (actor.ranks, actor.layout, actor.micro_batches) == ("0, 1", "dp2.zero1", 1)
    assert (critic.ranks, critic.layout, critic.micro_batches) == ("2, 3", "tp2", 1)
    assert critic.parameters - actor.parameters == 32, "one row of a head more"
    # Masters, two moments and gradients at least, of all or of half the parameters.
    assert actor.bytes_a_rank >= 16 * actor.parameters
    assert 8 * critic.parameters <= critic.bytes_a_rank < actor.bytes_a_rank
    frozen = role_numbers(run, stage, "reference", 4, 100)
    assert 4 * frozen.parameters <= frozen.bytes_a_rank < 9 * frozen.parameters


def test_a_reference_on_the_actors_base_costs_its_adapter(tmp_path: Any) -> None:
    loss = {"kl": "k3", "kl_coef": 0.1}
    adapter = {"kind": "lora", "rank": 2, "targets": ["q"]}
    run, stage = stage_of(tmp_path, "grpo", loss=loss, adapter=adapter)
    found = role_numbers(run, stage, "reference", 1, 100)
    assert found.bytes_a_rank == 4 * 2 * 2 * (32 + 32)  # fp32, A and B of two layers
    apart = {"reference": {"engine": {"layout": "dp1.zero0"}}}
    run, stage = stage_of(tmp_path, "grpo", loss=loss, adapter=adapter, roles=apart)
    found = role_numbers(run, stage, "reference", 1, 100)
    assert found.bytes_a_rank >= 4 * found.parameters


@pytest.mark.parametrize("kl,roles", [("none", ["actor"]), ("k3", ["actor", "reference"])])
def test_roles_of_grpo(tmp_path: Any, kl: str, roles: list[str]) -> None:
    loss = {"kl": kl, "kl_coef": 0.0 if kl == "none" else 0.1}
    _, stage = stage_of(tmp_path, "grpo", loss=loss)
    assert roles_in_use(stage) == roles


@pytest.mark.parametrize("kind", ["pretrain", "sft", "reward", "dpo"])
def test_stages_that_write_nothing_hold_their_roles(tmp_path: Any, kind: str) -> None:
    config = recipe(tmp_path / "run", kind)
    config["model"]["vocab_size"] = 300
    run = load_config(config).config
    [stage] = run.stages
    actor = role_numbers(run, stage, "actor", 1, 96)
    whole = bytes_a_rank(run, stage, 1, 96)
    assert isinstance(run.model, DecoderConfig)
    trained = run.model.as_scalar() if kind == "reward" else run.model
    assert actor.parameters == trained.num_parameters()
    assert 16 * actor.parameters <= actor.bytes_a_rank <= whole
    assert (whole > actor.bytes_a_rank) == (kind == "dpo"), "a reference beside the actor"


def test_what_generates_is_held_beside_what_is_trained(tmp_path: Any) -> None:
    run, stage = stage_of(tmp_path, "grpo")
    [role] = roles_in_use(stage)
    assert isinstance(run.model, DecoderConfig)
    weights = 2 * 4 * run.model.num_parameters()  # fp32, packed beside
    actor = role_numbers(run, stage, role, 1, 100)
    assert bytes_a_rank(run, stage, 1, 100) == actor.bytes_a_rank + weights
    # A cache may outgrow an update: here, long completions of one token's training.
    sampling = stage.sampling.model_copy(update={"max_new_tokens": 10_000})
    long = stage.model_copy(update={"sampling": sampling, "samples_per_prompt": 1})
    cached = 2 * 2 * 4 * 20_000 * 2 * 8 * 4  # K and V, layers, prompts, row, width, fp32
    small = long.batch.model_copy(update={"micro_batch": 1})
    long = long.model_copy(update={"batch": small})
    actor = role_numbers(run, long, role, 1, 20_000)
    turn = actor.bytes_a_rank - actor.steady_bytes
    found = bytes_a_rank(run, long, 1, 20_000)
    assert found == actor.steady_bytes + weights + max(cached, turn)
