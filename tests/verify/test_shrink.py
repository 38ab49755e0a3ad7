"""What verify makes of a recipe: small, and still the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.errors import UserError
from shardwise.parallel.layout import parse_layout
from shardwise.verify import suite
from shardwise.verify.roles import own_layouts, with_layouts
from shardwise.verify.run import sub_layouts
from shardwise.verify.shrink import shrink

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def small(run: RunConfig, stage: str, folder: Path) -> Any:
    again = load_config(run.model_dump(mode="json")).config  # as verify hands it to its ranks
    recipe = shrink(again, stage, [parse_layout("dp2.zero2", 2)], folder)
    return load_config(recipe).config.stages[0]


def ppo(**stage: Any) -> RunConfig:
    recipe = suite.recipe("llama")
    recipe["stages"] = [{**suite.STAGES["ppo"], **stage}]
    return load_config(recipe).config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_stage_of_our_recipes_can_be_made_small(path: Path, tmp_path: Path) -> None:
    run = load_config(path).config
    for stage in run.stages:
        assert small(run, stage.name, tmp_path).kind == stage.kind


def test_nulls_of_the_user_stay_null(tmp_path: Path) -> None:
    loss = {"preset": "verl_default", "value_clip": None, "dual_clip": None}
    found = small(ppo(loss=loss), "ppo", tmp_path).loss
    assert found.value_clip is None and found.dual_clip is None


def test_the_actor_is_trained_whatever_its_warm_up(tmp_path: Path) -> None:
    assert small(ppo(steps=20, critic_warmup_steps=10), "ppo", tmp_path).critic_warmup_steps == 1
    assert small(ppo(critic_warmup_steps=0), "ppo", tmp_path).critic_warmup_steps == 0


def test_a_roles_optimizer_is_kept_under_any_layout(tmp_path: Path) -> None:
    run = ppo(roles={"critic": {"optimizer": {"kind": "sgd", "lr": 0.1}, "ranks": [0]}})
    stage = small(run, "ppo", tmp_path)
    for text in ("tp2", "actor=tp2@0-1,critic=dp2.zero2@2-3"):
        critic = with_layouts(stage, text).roles.critic  # type: ignore[attr-defined]
        assert critic.optimizer.kind == "sgd"
        assert critic.ranks == ([2, 3] if "=" in text else None)


def test_the_recipes_own_layouts() -> None:
    def own(engine: str = "dp2.zero2", **roles: Any) -> str:
        return own_layouts(ppo(engine={"layout": engine}, roles=roles).stages[0])

    assert own() == "dp2.zero2"
    assert own(critic={"optimizer": {"lr": 1e-3}}) == "dp2.zero2"
    placed = own(actor={"ranks": [0, 1], "engine": {"layout": "tp2"}}, critic={"ranks": [2, 3]})
    assert placed == "actor=tp2@0-1,critic=dp2.zero2@2-3,reference=dp2.zero2,reward=dp2.zero2"
    with pytest.raises(UserError, match="layout auto"):
        own("auto")
    with pytest.raises(UserError, match="gaps"):
        own(critic={"ranks": [0, 2]})


@pytest.mark.parametrize(
    "layout,first,parts",
    [
        ("pp2.zbv", "pp2.1f1b", 1),
        ("tp2.sp", "tp2", 1),
        ("dp2.zero2", None, 0),
        ("tp2.sp.pp2.zbv", "tp2", 7),
    ],
)
def test_parts_of_a_layout_are_never_itself(layout: str, first: str | None, parts: int) -> None:
    found = sub_layouts(layout)
    assert layout not in found and len(found) == parts
    assert not found or found[0] == first
