"""Every recipe that is shipped loads, and can run on the machines it is meant for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.config.schema import TokenizerConfig
from shardwise.config.yaml12 import parse
from shardwise.errors import ConfigError
from shardwise.stages.run import preflight
from tests.support import smollm2

CONFIGS = Path(__file__).parents[2] / "configs"
# What is in `sweeps` is over recipes: tests/sweep/test_recipes.py.
RECIPES = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "sweeps")


def test_there_are_recipes() -> None:
    assert "quickstart.yaml" in [path.name for path in RECIPES]


def data_files(recipe: Any) -> Iterator[Path]:
    """Files that a recipe's sources name."""
    if isinstance(recipe, dict):
        if "max_expansion" in recipe and recipe["path"] is not None:
            yield recipe["path"]
        recipe = list(recipe.values())
    if isinstance(recipe, list):
        for part in recipe:
            yield from data_files(part)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing was run
    if path.parent.name == "smollm2":
        smollm2.write_start(tmp_path)
    config = load_config(path).config
    assert config.name == path.stem
    for file in data_files(config.model_dump()):
        assert not file.is_absolute()
        file.parent.mkdir(parents=True, exist_ok=True)
        shipped = CONFIGS.parent / file
        written = b'{"prompt": "1 + 1?", "completion": "2"}\n' if "runs" in file.parts else b""
        file.write_bytes(shipped.read_bytes() if shipped.exists() else written)
    if config.init_from is not None and not config.init_from.exists():
        with pytest.raises(ConfigError, match="run the recipe that makes it"):
            preflight(config, world_size=2)
        # As if it were there.
        start = {"init_from": None, "tokenizer": TokenizerConfig()}
        config = config.model_copy(update=start)
    preflight(config, world_size=2)


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name == "smollm2"], ids=str)
def test_results_were_measured_with_these_recipes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they say of the model by init_from alone is what they said in so many words."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"init_from .*runs/smollm2/model does not exist"):
        load_config(path)
    smollm2.write_start(tmp_path)
    found = load_config(path).config
    text = path.read_text()
    assert not {"model", "tokenizer"} & parse(text, path.name).data.keys()
    for name, earlier in smollm2.FORMATS.items():
        text = text.replace(f"{{kind: {name},", f"{{kind: {earlier},")
    before = load_config(parse(text, path.name).data | smollm2.SAID).config
    assert found.model.vocab_size == smollm2.CONFIG["vocab_size"] and before.model.vocab_size == 0
    sized = before.model.model_copy(update={"vocab_size": found.model.vocab_size})
    dumped = before.model_copy(update={"model": sized}).model_dump_json()
    for name, earlier in smollm2.FORMATS.items():
        dumped = dumped.replace(f'"kind":"{earlier}"', f'"kind":"{name}"')
    assert found.model_dump_json() == dumped


def test_ppo_starts_from_the_model_of_the_quickstart() -> None:
    """No test has the weights at hand, so a run would be the first to notice."""
    folder = Path(__file__).parents[2] / "configs"
    ppo, quickstart = (load_config(folder / f"{n}.yaml").config for n in ("ppo_cpu", "quickstart"))
    assert ppo.model.model_copy(update={"vocab_size": 0}) == quickstart.model.model_copy(
        update={"vocab_size": 0}
    )
