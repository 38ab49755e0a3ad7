"""Kinds of optimizers in a recipe: their own keys alone, old recipes, groups, other packages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from shardwise.config import registry as configs
from shardwise.config.export import json_schema
from shardwise.config.load import load_config
from shardwise.config.optimizers import AdamWConfig, OptimizerConfig, SgdConfig
from shardwise.errors import ConfigError
from shardwise.optim import registry
from shardwise.stages.run import preflight

MODEL = {"family": "llama", "hidden_size": 32, "num_layers": 2, "num_heads": 2}
MODEL |= {"num_kv_heads": 2, "ffn_size": 32, "vocab_size": 260}


def recipe(**optimizer: Any) -> dict[str, Any]:
    data = {"sources": [{"kind": "stdlib"}]}
    stage = {"kind": "pretrain", "steps": 1, "data": data, "optimizer": optimizer}
    return {"model": MODEL, "tokenizer": {"kind": "bytes"}, "stages": [stage]}


def optimizer_of(**optimizer: Any) -> OptimizerConfig:
    return load_config(recipe(**optimizer)).config.stages[0].optimizer


def test_no_kind_is_adamw_and_each_kind_has_its_own_keys() -> None:
    assert optimizer_of(lr=1e-3, beta2=0.99) == AdamWConfig(lr=1e-3, beta2=0.99)
    assert optimizer_of(kind="sgd", nesterov=True) == SgdConfig(kind="sgd", nesterov=True)
    for wrong, message in (
        ({"kind": "adamww"}, "given 'adamww'.*did you mean 'adamw'"),
        ({"momentum": 0.5}, "momentum.*unknown key"),
        ({"kind": "sgd", "beta1": 0.5}, "beta1.*unknown key"),
        ({"kind": "sgd", "momentun": 0.5}, "momentun.*did you mean 'momentum'"),
        ({"groups": [{"match": "*", "lr_scal": 2.0}]}, r"groups\.0\.lr_scal.*'lr_scale'"),
        ({"groups": [{"match": "*"}]}, r"groups\.0.*changes nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            optimizer_of(**wrong)


def test_recipes_written_out_when_all_kinds_had_all_keys_load() -> None:
    once = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "momentum": 0.9, "nesterov": False}
    assert optimizer_of(kind="adamw", **once) == AdamWConfig()
    assert optimizer_of(kind="sgd", **once) == SgdConfig(kind="sgd")


def test_a_group_that_is_nobodys_is_refused_with_its_key_and_the_nearest_name(
    tmp_path: Path,
) -> None:
    groups = [{"match": "layers.*.atn.*", "lr_scale": 2.0}]
    run = load_config({**recipe(groups=groups), "run_dir": str(tmp_path)}).config
    with pytest.raises(ConfigError, match=r"stages\.0\.optimizer\.groups.*'layers\.\*\.attn\."):
        preflight(run, 1)
    good = recipe(groups=[{"match": "layers.*.attn.*", "lr_scale": 2.0}])
    preflight(load_config({**good, "run_dir": str(tmp_path)}).config, 1)


def test_the_schema_of_a_recipe_has_every_kind() -> None:
    kinds = json_schema()["$defs"]["OptimizerConfig"]["anyOf"]
    assert {k["properties"]["kind"]["const"] for k in kinds} == set(registry._BUILDERS)


def test_another_package_adds_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Guest(OptimizerConfig):
        kind: Literal["guest"]
        depth: int = 1

    made = SimpleNamespace()
    monkeypatch.setitem(configs.OPTIMIZER_CONFIGS, "guest", Guest)
    monkeypatch.setitem(registry._BUILDERS, "guest", lambda *_: made)
    assert optimizer_of(kind="guest", depth=3).depth == 3  # type: ignore[attr-defined]
    assert registry.builder_of("guest")([], None, None) is made
