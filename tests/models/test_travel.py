"""What came with a model is there at the end, unchanged, and transformers understands it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from shardwise.checkpoint.convert import convert, open_model
from shardwise.data.tokenizer import byte_alphabet, load_tokenizer
from shardwise.errors import CheckpointError, DataError
from shardwise.models import registry, travel
from shardwise.models.common.init import init_weights
from shardwise.rollout.api import encode_prompt
from tests.stages.recipes import recipe, run
from tests.support import toy
from tests.support.pool import RankPool

SPECIALS = ("<s>", "<end>", "<call>", "<unk>", "<tool>")
CHAT = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}<end>{% endfor %}<s>assistant "
CALL = "{{ tools }}" + CHAT
SAID: dict[str, Any] = {  # beside config.json and the weights
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "unk_token": {"content": "<unk>", "__type": "AddedToken"},
        "additional_special_tokens": ["<tool>"],
        "model_max_length": 77,
        "padding_side": "left",
    },
    "special_tokens_map.json": {"eos_token": "<end>", "unk_token": "<unk>"},
    "added_tokens.json": {"<tool>": 260},
    "generation_config.json": {
        "eos_token_id": [257, 258], "do_sample": True, "temperature": 0.6, "top_p": 0.9,
        "transformers_version": "4.40.0",
    },
}  # fmt: skip
OWN_KEYS = {"attention_dropout": 0.25, "pretraining_tp": 1, "note": {"by": "them"}}


def write_tokenizer(folder: Path) -> None:
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIALS])
    backend.enable_truncation(9)  # a setting that we do not use
    backend.save(str(folder / "tokenizer.json"))


def write_folder(folder: Path, **model: Any) -> dict[str, Any]:
    """A Hugging Face folder of which every part says something; returns its config.json."""
    config = toy.llama(vocab_size=261, max_seq_len=128, **model)
    built = registry.build(config)
    init_weights(built, 0)
    registry.to_hf(folder, config, built.named_parameters())
    write_tokenizer(folder)
    for name, value in SAID.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(CALL)
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text()) | OWN_KEYS
    raw |= {"eos_token_id": [257, 258]}
    (folder / "config.json").write_text(json.dumps(raw))
    return raw


def unchanged(before: Path, after: Path) -> None:
    """All files but the weights: bytes of the tokenizer's, values of the model's."""
    names = travel.read(before).keys()
    assert names == travel.read(after).keys() and len(names) == 8
    for name in names:
        old, new = (before / name).read_bytes(), (after / name).read_bytes()
        assert old == new or (name in travel.MODEL and json.loads(old) == json.loads(new)), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "hf")
    return tmp_path / "hf"


def test_import_and_export_change_nothing(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "out")
    unchanged(folder, tmp_path / "out")


def test_training_changes_nothing(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "sft")
    config["stages"][0] |= {"steps": 1}
    config |= {"init_from": str(folder)}
    del config["model"]
    ranks.run(run, config, world=1)
    convert(tmp_path / "run" / "stages" / "sft" / "checkpoints", tmp_path / "out")
    unchanged(folder, tmp_path / "out")


def test_transformers_reads_all_of_it(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(folder, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == {"default": CHAT, "tool_use": CALL}
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<unk>", None)
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (77, "left")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    said = model.generation_config
    assert (said.eos_token_id, said.temperature, said.top_p) == ([257, 258], 0.6, 0.9)
    ours = load_tokenizer(folder)
    assert ours.stop_ids == (257, 258) and ours.named_ids == {"eos": 257}
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert ours.decode(encode_prompt(ours, "hi"), skip_special=False) == prompt


def test_what_a_model_learns_to_end_with_is_added(tmp_path: Path) -> None:
    """Its files name one end token; its template and tokenizer know another."""
    write_folder(tmp_path / "hf")
    for name in ("generation_config.json", "special_tokens_map.json"):
        (tmp_path / "hf" / name).unlink()
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    raw |= {"eos_token_id": 258, "temperature": 0.3}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw))
    convert(tmp_path / "hf", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert said == {"eos_token_id": [258, 257], "temperature": 0.3}  # no pad is invented


@pytest.mark.parametrize("kind", ["file", "key", "list"])
def test_a_template_of_the_recipe_replaces_the_default_one(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    transformers = pytest.importorskip("transformers")
    if kind != "file":
        (folder / "chat_template.jinja").unlink()
        (folder / "additional_chat_templates" / "tool_use.jinja").unlink()
        both = [{"name": n, "template": t} for n, t in (("tool_use", CALL), ("default", CHAT))]
        raw = SAID["tokenizer_config.json"] | {"chat_template": CHAT if kind == "key" else both}
        (folder / "tokenizer_config.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == CHAT
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save(tmp_path / "saved")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template
    expected: Any = {"default": "{{ messages[0].content }}", "tool_use": CALL}
    assert read == (expected["default"] if kind == "key" else expected)
    assert load_tokenizer(tmp_path / "saved").chat_template == "{{ messages[0].content }}"


def test_another_length_changes_one_key(folder: Path, tmp_path: Path) -> None:
    before = json.loads((folder / "config.json").read_text())
    model = open_model(folder)
    config = model.config.model_copy(update={"max_seq_len": 64})
    registry.to_hf(tmp_path / "out", config, model.tensors, carried=model.files)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k for k in before if before[k] != after[k]} == {"max_position_embeddings"}
    assert before.keys() == after.keys() and after["max_position_embeddings"] == 64


def test_a_class_that_computes_the_same_stays_what_it_was(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "hf")
    raw |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    raw["sliding_window"] = None
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw))
    convert(tmp_path / "hf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == raw


def test_an_end_token_in_the_map_alone(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder).eos_id == 257


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("generation_config.json", '{"eos_token_id": ["2"]}', "generation_config.json: eos_token"),
        ("generation_config.json", "[]", "generation_config.json: must hold"),
        ("special_tokens_map.json", "{", "special_tokens_map.json: not JSON"),
        ("additional_chat_templates/a b.jinja", "", "additional_chat_templates/a b.jinja: rename"),
    ],
)
def test_what_cannot_travel_is_named(folder: Path, name: str, text: str, said: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=said):
        load_tokenizer(folder)
    with pytest.raises((CheckpointError, DataError), match=said):
        convert(folder, folder.parent / "out")
