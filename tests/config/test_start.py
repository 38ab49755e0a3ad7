"""What init_from says: filled in where the recipe says nothing, with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.config import start
from shardwise.config.export import print_config, resolved_yaml
from shardwise.config.load import load_config
from shardwise.config.source import Source
from shardwise.config.start import Start
from shardwise.config.yaml12 import parse
from shardwise.errors import CheckpointError, ConfigError
from tests.config.toy import ToyModel

STAGES = [{"kind": "learn", "steps": 1}]
TOKENIZER = {"kind": "file", "path": "there/tokenizer.json"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder: ``model.json``, and ``tokenizer.json`` for the section of one."""

    def read(ref: str) -> Start:
        said = {name: Path(ref, f"{name}.json") for name in ("model", "tokenizer")}
        if not said["model"].exists():
            raise CheckpointError(f"{ref}: no model.json")
        found = {n: json.loads(p.read_text()) if p.exists() else None for n, p in said.items()}
        return Start(found["model"] or {}, found["tokenizer"])

    monkeypatch.setattr(start, "_READERS", [read])
    model = ToyModel(width=24, max_seq_len=4096, weights=Path("x"))
    (tmp_path / "model.json").write_text(model.model_dump_json())
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return tmp_path


def recipe(folder: Path, **said: Any) -> dict[str, Any]:
    return {"init_from": str(folder), "stages": STAGES, **said}


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": {}}])
def test_alone_it_says_model_and_tokenizer(folder: Path, model: dict[str, Any]) -> None:
    loaded = load_config(recipe(folder, **model))
    assert loaded.config.model == ToyModel(width=24, max_seq_len=4096, weights=Path("x"))
    assert loaded.config.tokenizer.model_dump(mode="json", include={"kind", "path"}) == TOKENIZER
    source = Source("start", file=str(folder))
    assert loaded.provenance["model.width"] == loaded.provenance["tokenizer.path"] == source
    assert loaded.provenance["tokenizer.vocab_size"] == Source()
    [line] = [x for x in print_config(loaded).splitlines() if x.startswith("model.width ")]
    assert line.endswith(f"# init_from: {folder}")


def test_single_keys_count_more(folder: Path) -> None:
    file = folder / "r.yaml"
    file.write_text(
        f"init_from: {folder}\nmodel: {{max_seq_len: 512}}\n"
        "tokenizer: {chat_template: '{{ x }}'}\nstages: [{kind: learn, steps: 1}]\n"
    )
    loaded = load_config(file, ["model.width=9"])
    assert loaded.config.model == ToyModel(width=9, max_seq_len=512, weights=Path("x"))
    assert loaded.provenance["model.max_seq_len"].line == 2
    assert loaded.provenance["model.width"].kind == "override"
    assert loaded.provenance["model.weights"].kind == "start"
    tokenizer = loaded.config.tokenizer
    assert (str(tokenizer.path), tokenizer.chat_template) == (TOKENIZER["path"], "{{ x }}")


def test_a_section_with_a_family_is_whole(folder: Path) -> None:
    said = {"model": {"family": "toy"}, "tokenizer": {"kind": "bytes"}}
    assert load_config(recipe(folder, **said)).config.model == ToyModel()
    # So a resolved recipe loads when the folder is gone.
    loaded = load_config(recipe(folder))
    for file in folder.glob("*.json"):
        file.unlink()
    again = load_config(parse(resolved_yaml(loaded.config), "resolved").data)
    assert again.config == loaded.config


def test_bytes_are_read_where_no_tokenizer_came_with_a_whole_model(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    loaded = load_config(recipe(folder, model={"family": "toy"}))
    assert loaded.config.tokenizer.kind == "bytes"
    assert load_config(recipe(folder, tokenizer={"kind": "bytes"})).config.model == ToyModel(
        width=24, max_seq_len=4096, weights=Path("x")
    )
    with pytest.raises(ConfigError, match=r"init_from .*without a tokenizer.*tokenizer\.kind"):
        load_config(recipe(folder))


def test_what_cannot_be_is_one_sentence_with_its_place(folder: Path) -> None:
    for ref, words in (
        (folder / "none", f"{folder / 'none'} does not exist"),
        (folder.parent, f"{folder.parent}: no model.json"),
        ("hf:name", "write hf:org/name"),
    ):
        file = folder / "r.yaml"
        file.write_text(f"stages: [{{kind: learn, steps: 1}}]\ninit_from: {ref}\n")
        with pytest.raises(ConfigError) as error:
            load_config(file)
        assert str(error.value).startswith(f"init_from ({file}:2): ")
        assert words in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_key_over_it_is_told_with_its_nearest_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        load_config(recipe(folder, model={"wdth": 3}))


def test_without_it_the_message_names_it() -> None:
    for model in ({}, {"model": {"width": 3}}):
        with pytest.raises(ConfigError, match="or say in init_from which model"):
            load_config({"stages": STAGES} | model)
