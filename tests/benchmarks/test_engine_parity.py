"""What docs/engines.md shows is what the last run found, and what the kinds say of themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks import engine_parity
from shardwise.config.load import load_config
from shardwise.config.registry import ENGINE_CONFIGS
from shardwise.errors import ConfigError
from shardwise.stages.run import preflight
from tests.engines.test_registry import recipe

PAGE = engine_parity.PAGE.read_text(encoding="utf-8")


def test_the_table_is_of_the_last_run() -> None:
    results = json.loads(engine_parity.RESULTS.read_text())
    assert engine_parity.table(results) in PAGE
    for engine, found in results.items():
        rows = [row for stage in found["stages"].values() for row in stage.values()]
        assert all(row["passed"] for row in rows), engine
        assert {"pretrain", "sft", "reward", "grpo"} <= found["stages"].keys()
        assert all(len(stage) >= 8 for stage in found["stages"].values())


def test_a_table_says_what_failed() -> None:
    row = {"passed": True, "worst": 0.5}
    stages = {"sft": {"dp1": row, "tp2": {"passed": False, "worst": 3.0}}}
    text = engine_parity.table({"x": {"version": "1", "precision": "fp32", "stages": stages}})
    assert "| x (1, fp32) | sft | dp1 tp2 | differs: tp2 |" in text


def test_every_kind_is_described() -> None:
    first = PAGE.partition("```yaml")[0]
    described = re.findall(r"^\| `(\w+)`", first, re.M)
    assert described == ["native", "deepspeed", "megatron", "plain"]
    assert set(ENGINE_CONFIGS) >= set(described)


def test_the_recipe_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}, indent=1))
    [block] = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    loaded = load_config(recipe(yaml.safe_load(block)["engine"]))
    [said] = re.findall(r"```text\nstages\.0, pretrain \(.*?\): (.*?)```", PAGE, re.S)
    with pytest.raises(ConfigError) as error:
        preflight(loaded.config, 8)
    told = re.sub(r"dp\d", "dp", str(error.value)).replace("ds.json:3", "ds.json:4")
    assert re.sub(r"dp\d", "dp", " ".join(said.split())) in told
