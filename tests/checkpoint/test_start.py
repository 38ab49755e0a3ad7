"""What a model folder says of itself, whatever wrote it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.adapters.peft import PeftAdapter, Update
from shardwise.adapters.peft_write import write
from shardwise.checkpoint.convert import convert, open_model
from shardwise.checkpoint.start import read_start
from shardwise.config.load import load_config
from shardwise.config.schema import TokenizerConfig
from shardwise.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from shardwise.errors import CheckpointError, UserError
from tests.data.test_tiktoken_file import _ranks, _write
from tests.models import test_gguf
from tests.models.test_travel import CHAT, write_folder
from tests.support.hub import HubCache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "hf")
    return tmp_path / "hf"


def tokenizer_of(section: dict[str, Any] | None) -> Any:
    """The section as a recipe's, and what it loads."""
    config = TokenizerConfig.model_validate_json(json.dumps(section), strict=True)
    assert tokenizer_fingerprint(config) == tokenizer_fingerprint(config)
    return load_tokenizer(config)


def test_a_hugging_face_folder_without_its_weights(folder: Path) -> None:
    whole = open_model(folder).config
    (folder / "model.safetensors").unlink()
    said = read_start(str(folder))
    assert said.model == whole.model_dump(mode="json")
    tokenizer = tokenizer_of(said.tokenizer)
    assert (tokenizer.vocab_size, tokenizer.chat_template) == (261, CHAT)
    assert "additional_chat_templates/tool_use.jinja" in tokenizer.files()  # what travels, does


def test_checkpoints_and_the_newest_of_them(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "run", "native")
    for place in (tmp_path / "run", tmp_path / "run" / "step_00000000"):
        said = read_start(str(place))
        assert said.model == open_model(folder).config.model_dump(mode="json")
        assert tokenizer_of(said.tokenizer).hash == load_tokenizer(folder).hash


def test_a_tiktoken_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert read_start(str(folder)).tokenizer is None
    _write(folder / "r50k_base.tiktoken", _ranks(r"\S+|\s+"))
    said = read_start(str(folder))
    assert said.tokenizer == {"kind": "tiktoken", "path": f"{folder}/r50k_base.tiktoken"}


def test_a_sentencepiece_model(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")
    wanted = {"kind": "sentencepiece", "path": f"{folder}/tokenizer.model"}
    assert read_start(str(folder)).tokenizer == wanted


def adapter_folder(place: Path, base: Path, named: str) -> None:
    model: Any = open_model(base).config
    update = Update(torch.zeros(2, 32), torch.zeros(32, 2), 1.0)
    write(place, PeftAdapter({"layers.0.attn.q": update}, False), model, named)


def test_an_adapter_in_pefts_form(folder: Path, tmp_path: Path, hub_cache: HubCache) -> None:
    hub_cache.add("org/base", folder)
    for name, base in (("path", str(folder)), ("hub", "org/base")):
        place = tmp_path / name
        adapter_folder(place, folder, base)
        said = read_start(str(place))
        assert said.model == open_model(folder).config.model_dump(mode="json")
        assert tokenizer_of(said.tokenizer).hash == load_tokenizer(folder).hash
        shutil.copy(folder / "tokenizer.json", place)
        (place / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
        assert tokenizer_of(read_start(str(place)).tokenizer).eos_id == 256  # its own counts more
    adapter_folder(tmp_path / "lost", folder, "org/other")
    with pytest.raises(UserError, match=r"is 'org/other', which is no file.*not in the cache"):
        read_start(str(tmp_path / "lost"))


def test_a_gguf_file(tmp_path: Path) -> None:
    test_gguf._write(file := tmp_path / "x.gguf", "F32")
    said = read_start(str(file))
    assert said.model == open_model(file).config.model_dump(mode="json")
    tokenizer = tokenizer_of(said.tokenizer)
    convert(file, tmp_path / "out")
    assert tokenizer.hash == load_tokenizer(tmp_path / "out").hash
    assert tokenizer.chat_template == load_tokenizer(tmp_path / "out").chat_template is not None


def test_a_name_on_the_hub(folder: Path, hub_cache: HubCache) -> None:
    hub_cache.add("org/name", folder)
    said = read_start("hf:org/name")
    assert said.tokenizer == {"kind": "file", "path": "hf:org/name/tokenizer.json"}
    assert tokenizer_of(said.tokenizer).hash == load_tokenizer(folder).hash
    loaded = load_config({"init_from": "hf:org/name", "stages": [{"kind": "pretrain", "steps": 1}]})
    assert loaded.config.model == open_model("hf:org/name").config == open_model(folder).config
    assert str(loaded.config.init_from) == "hf:org/name"
    assert loaded.config.start is not None and (loaded.config.start / "config.json").exists()


def test_a_family_that_we_have_not(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(CheckpointError, match=r"config\.json: model_type 'mamba' is not supported"):
        read_start(str(folder))
