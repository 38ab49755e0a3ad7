"""Every recipe that is shipped loads, and can run on the machines it is meant for."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.config.load import load_config
from shardwise.config.schema import TokenizerConfig
from shardwise.errors import ConfigError
from shardwise.stages.run import preflight

RECIPES = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert "quickstart.yaml" in [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path: Path) -> None:
    config = load_config(path).config
    assert config.name == path.stem
    if config.init_from is not None and not config.init_from.exists():
        with pytest.raises(ConfigError, match="run the recipe that makes it"):
            preflight(config, world_size=2)
        # As if it were there.
        start = {"init_from": None, "tokenizer": TokenizerConfig()}
        config = config.model_copy(update=start)
    preflight(config, world_size=2)


def test_ppo_starts_from_the_model_of_the_quickstart() -> None:
    """No test has the weights at hand, so a run would be the first to notice."""
    folder = Path(__file__).parents[2] / "configs"
    ppo, quickstart = (load_config(folder / f"{n}.yaml").config for n in ("ppo_cpu", "quickstart"))
    assert ppo.model.model_copy(update={"vocab_size": 0}) == quickstart.model.model_copy(
        update={"vocab_size": 0}
    )
