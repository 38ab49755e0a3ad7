"""Every recipe that is shipped loads, and can run on the machines it is meant for."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.config.load import load_config
from shardwise.stages.run import preflight

RECIPES = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert "quickstart.yaml" in [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path: Path) -> None:
    loaded = load_config(path)
    assert loaded.config.name == path.stem
    preflight(loaded.config, world_size=2)
