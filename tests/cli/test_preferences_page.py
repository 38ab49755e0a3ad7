"""What docs/preferences.md shows is true: its recipe trains on its rows, its command compares."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml

from shardwise.losses.preference_config import _Kinds
from tests.cli.conftest import Command, shardwise  # noqa: F401  # a fixture
from tests.stages.recipes import run
from tests.support.pool import RankPool

PAGE = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text(encoding="utf-8")


def _block(language: str) -> str:
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_recipe_trains_on_the_rows(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load(_block("yaml"))
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(_block("json"))
    [source] = recipe["stages"][0]["data"]["sources"]
    source["path"] = str(rows)
    recipe |= {"run_dir": str(tmp_path / "run"), "engine": {"compile": False}}
    [summary] = ranks.run(run, recipe, world=1)
    assert summary["stages"][0]["name"] == "dpo"


def test_the_command_compares(shardwise: Command) -> None:  # noqa: F811
    code, _, err = shardwise(*shlex.split(_block("sh"))[1:])
    assert code == 1 and "sft_weight" in err


def test_the_table_holds_every_kind() -> None:
    kinds = {k for c in get_args(_Kinds) for k in get_args(c.model_fields["kind"].annotation)}
    table = PAGE.split("| `loss.kind`")[1].split("\n\n")[0]
    told = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line[:26])}
    assert told == kinds
