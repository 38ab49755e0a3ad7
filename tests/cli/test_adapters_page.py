"""What docs/adapters.md shows is true: its recipe trains, and its command writes a model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from shardwise.config.adapters import FreezeConfig
from shardwise.models.hf_folder import from_hf
from tests.cli.conftest import Command
from tests.stages.recipes import run
from tests.support.pool import RankPool

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_its_recipe_trains_and_its_command_merges(
    shardwise: Command, ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, freeze = (yaml.safe_load(block) for block in blocks("yaml"))
    FreezeConfig.model_validate(freeze["freeze"])
    recipe["run_dir"] = str(tmp_path / "runs" / recipe["name"])
    ranks.run(run, recipe, world=1)
    monkeypatch.chdir(tmp_path)
    [command] = blocks("console")
    code, out, err = shardwise(*shlex.split(command)[1:])
    assert code == 0, out + err
    config, _ = from_hf(tmp_path / "merged")
    assert config.family == recipe["model"]["family"]
