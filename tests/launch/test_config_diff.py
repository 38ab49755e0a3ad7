"""What differs between recipes, runs and presets is told by its key, and no secret with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.export import resolved_yaml
from shardwise.config.load import load_config
from shardwise.errors import UserError
from shardwise.launch.config_diff import config_diff
from tests.cli.conftest import Command, shardwise  # noqa: F401  # a fixture

MODEL = {
    "family": "llama",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "ffn_size": 32,
}


def recipe(path: Path, **more: Any) -> str:
    said = {
        "name": "one",
        "model": MODEL,
        "stages": [
            {"kind": "sft", "steps": 4, "task": {}},
            {"kind": "dpo", "steps": 2, "task": {}, "loss": {"beta": 0.2}},
        ],
        **more,
    }
    path.write_text(json.dumps(said))
    return str(path)


def test_recipes_and_runs_differ_by_key(tmp_path: Path) -> None:
    a = recipe(tmp_path / "a.yaml")
    stages = [{"kind": "dpo", "steps": 3, "task": {}, "loss": {"preset": "simpo_llama3"}}]
    b = recipe(tmp_path / "b.yaml", stages=stages, seed=4)
    assert config_diff(a, a).values == {}
    values = config_diff(a, b).values
    assert values["seed"] == (0, 4) and values["stages.dpo.steps"] == (2, 3)
    assert values["stages.dpo.loss.kind"] == ("sigmoid", "simpo")
    assert values["stages.dpo.loss.beta"] == (0.2, 2.0)
    assert values["stages.sft.steps"] == (4, None)  # by name, not by place
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(resolved_yaml(load_config(Path(a)).config))
    assert config_diff(a, str(run)).values == {}


def test_secrets_are_masked(tmp_path: Path) -> None:
    url = "https://someone:{}@host/x"
    sides = [
        recipe(tmp_path / f"{name}.yaml", logging={"wandb_project": url.format(f"{name}pw12345")})
        for name in ("a", "b")
    ]
    found = config_diff(*sides)
    assert "pw12345" not in str(found) and "pw12345" not in "\n".join(found.lines())


def test_presets_say_where_they_come_from() -> None:
    found = config_diff("dpo:trl_default", "iterative_rpo")
    assert found.values["sft_weight"] == (None, 1.0)
    assert "TRL 1.16" in found.lines()[0] and "2404.19733" in found.lines()[1]
    for pair in (("trl_default", "trl_default"), ("dapo_paper", "dpo_paper"), ("nothing", "x")):
        with pytest.raises(UserError, match=r"FAMILY:NAME|no preset"):
            config_diff(*pair)


def test_the_command_says_equal_or_what_differs(
    shardwise: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    a, b = recipe(tmp_path / "a.yaml"), recipe(tmp_path / "b.yaml", seed=9)
    code, out, _ = shardwise("config", "diff", a, a)
    assert code == 0 and "equal" in out
    code, _, err = shardwise("config", "diff", a, b)
    assert code == 1 and "seed: 0 against 9" in err
    code, _, err = shardwise("config", "diff", a, "dpo_paper")
    assert code == UserError.exit_code and "compared with another preset" in err
