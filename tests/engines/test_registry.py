"""Kinds of engines: their keys in a recipe, one contract, and nobody outside who names one."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from shardwise.config import registry as configs
from shardwise.config.export import config_hash, json_schema
from shardwise.config.load import load_config
from shardwise.config.schema import EngineConfig, NativeConfig
from shardwise.engines import registry
from shardwise.engines.base import Engine
from shardwise.engines.native import NativeEngine
from shardwise.engines.placed import PlacedEngine
from shardwise.engines.plain import PlainEngine
from shardwise.engines.plain_config import PlainConfig
from shardwise.errors import ConfigError
from shardwise.parallel.layout import parse_layout
from tests.test_structure import PACKAGE, imports, sources

MODEL = {"family": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
MODEL |= {"num_kv_heads": 2, "ffn_size": 32}


def recipe(top: dict[str, Any], /, **stage: Any) -> dict[str, Any]:
    data = {"sources": [{"kind": "text", "path": "a.txt"}]}
    first = {"kind": "pretrain", "steps": 1, "data": data, **stage}
    return {"model": MODEL, "engine": top, "stages": [first]}


def engine_of(*args: Any, **stage: Any) -> EngineConfig:
    return load_config(recipe(*args, **stage)).config.stages[0].engine


# --- recipes --------------------------------------------------------------------------------------


def test_an_engine_without_a_kind_is_native_and_hashes_as_ever() -> None:
    said = engine_of({"kind": "native", "compile": False})
    assert isinstance(said, NativeConfig) and engine_of({"compile": False}) == said
    # What earlier versions wrote into checkpoints and results.
    assert config_hash(NativeConfig()) == "baad82fcfb8b0929c3df082310a599c8"
    assert config_hash(engine_of({})) == config_hash(NativeConfig())


def test_each_kind_has_its_own_keys() -> None:
    plain = engine_of({"kind": "plain", "split": "rows", "precision": "fp64"})
    assert isinstance(plain, PlainConfig) and (plain.split, plain.precision) == ("rows", "fp64")
    for engine, message in (
        ({"kind": "plain", "splt": "rows"}, "splt.*unknown key; did you mean 'split'"),
        ({"kind": "plain", "compile": False}, "compile.*unknown key"),
        ({"compil": False}, "compil.*did you mean 'compile'"),
        ({"kind": "plane"}, "given 'plane'.*allowed: one of .*native, plain; did you mean 'plain'"),
        ({"kind": "plain", "skip": [-1]}, r"skip\.0.*at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(recipe(engine))


def test_another_kind_inherits_what_all_kinds_have() -> None:
    top = {"precision": "fp64", "compile": False, "recompute": "full", "max_grad_norm": 0.5}
    plain = engine_of(top, engine={"kind": "plain"})
    assert isinstance(plain, PlainConfig)
    assert (plain.precision, plain.max_grad_norm) == ("fp64", 0.5)
    back = engine_of({"kind": "plain", "split": "rows"}, engine={"kind": "native"})
    assert back == NativeConfig()
    # Of the kind that stands above, an unknown key of a stage is explained.
    with pytest.raises(ConfigError, match="did you mean 'split'"):
        engine_of({"kind": "plain"}, engine={"splits": "rows"})


def test_a_role_may_have_another_kind_than_its_stage() -> None:
    stage = {
        "kind": "ppo",
        "steps": 1,
        "engine": {"recompute": "full", "precision": "bf16"},
        "roles": {"reference": {"engine": {"kind": "plain"}, "ranks": [0]}},
    }
    config = load_config({"model": MODEL, "stages": [stage]}).config.stages[0]
    reference = config.roles.reference.engine  # type: ignore[attr-defined]
    assert isinstance(config.engine, NativeConfig) and config.engine.recompute == "full"
    assert isinstance(reference, PlainConfig) and reference.precision == "bf16"


def test_the_schema_of_a_recipe_has_every_kind() -> None:
    schema = json_schema()
    kinds = schema["$defs"]["EngineConfig"]["anyOf"]
    found = [k["properties"]["kind"]["const"] for k in kinds]
    assert {"megatron", "native", "plain"} <= set(found)
    assert "split" in schema["$defs"]["PlainConfig"]["properties"]
    assert "compile" not in schema["$defs"]["PlainConfig"]["properties"]
    assert json.dumps(schema["$defs"]["SftConfig"]["properties"]["engine"]).count("EngineConfig")


# --- building -------------------------------------------------------------------------------------


def test_plain_refuses_more_ranks_than_one() -> None:
    config = PlainConfig(kind="plain", layout="dp2")
    with pytest.raises(ConfigError, match=r"engine.kind: plain.*engine.layout dp2.*has 2"):
        registry.check_layout(config, parse_layout("dp2", 2))
    registry.check_layout(config, parse_layout("dp1", 1))
    registry.check_layout(NativeConfig(), parse_layout("dp2", 2))


def test_another_package_adds_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Guest(EngineConfig):
        kind: Literal["guest"]
        depth: int = 1

    built = SimpleNamespace(kind="an engine")
    monkeypatch.setitem(configs.ENGINE_CONFIGS, "guest", Guest)
    monkeypatch.setitem(registry._BUILDERS, "guest", lambda setup: built)
    config = engine_of({"kind": "guest", "depth": 3, "precision": "bf16"})
    assert isinstance(config, Guest) and config.depth == 3
    setup: Any = SimpleNamespace(config=config, layout=parse_layout("dp2", 2), ranks=None)
    assert registry.build_engine(setup) is built


# --- the contract ---------------------------------------------------------------------------------

METHODS = [n for n, m in vars(Engine).items() if callable(m) and not n.startswith("_")]


@pytest.mark.parametrize("cls", [NativeEngine, PlainEngine, PlacedEngine])
def test_every_engine_has_the_whole_contract(cls: type) -> None:
    assert len(METHODS) > 15
    for name in METHODS:
        wanted = inspect.signature(getattr(Engine, name)).parameters
        have = inspect.signature(getattr(cls, name)).parameters
        assert [p for p in have if p in wanted] == list(wanted), name
        rest = [p for n, p in have.items() if n not in wanted]
        assert all(p.default is not inspect.Parameter.empty for p in rest), name


def test_nobody_outside_names_a_concrete_engine() -> None:
    inside = PACKAGE / "engines"
    allowed = {"base", "registry", "plain_config"}  # a kind is named by its config
    for path in sources(PACKAGE):
        if inside in path.parents:
            continue
        named = {m.split(".")[2] for _, m in imports(path) if m.startswith("shardwise.engines.")}
        assert named <= allowed, path


FORBIDDEN = (
    "shardwise.engines.native",
    "shardwise.engines.inputs",
    "shardwise.engines.reduction",
    "shardwise.engines.named_parameters",
    "shardwise.optim",
    "shardwise.precision.fp8",
    "shardwise.precision.loss_scale",
    "shardwise.ops.fp8",
)


def test_the_oracle_shares_nothing_with_native_but_model_and_losses() -> None:
    files = sorted(Path(inspect.getfile(PlainEngine)).parent.glob("plain*.py"))
    assert len(files) >= 3
    for path in files:
        for _, module in imports(path):
            assert not module.startswith(FORBIDDEN), (path, module)
            # A layout's name may be read; what makes ranks of it may not.
            assert not module.startswith("shardwise.parallel") or "layout" in module, (path, module)
