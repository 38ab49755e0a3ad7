"""Files of every kind, damaged by chance and by malice: read, or refused by an error that is ours.

Anything else would end a command with exit code 70. The chances are seeded, so that a failure comes
again; its message holds the reader, the kind of the change and the seed.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shardwise.checkpoint.convert import convert
from shardwise.config.export import resolved_yaml
from shardwise.config.load import load_config
from shardwise.data.chat import encode_chat
from shardwise.data.datasets import build_chat_examples
from shardwise.data.preferences import read_rankings
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import ByteTokenizer, load_tokenizer
from shardwise.errors import ShardwiseError
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.init import init_weights
from shardwise.models.dense.gpt2 import GPT2Config
from shardwise.models.dense.llama import LlamaConfig
from shardwise.models.registry import build, to_hf

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
SEEDS = 40  # of each change of each file
DEEP = "[" * 10_000 + "]" * 10_000
# As JSON text: Python would not write some of them.
EXTREMES = (
    "-1", "0", "1", "-0.0", "0.5", str(2**31), str(2**63), str(2**64), "9" * 5000, "1e308", "1e999",
    "NaN", "-Infinity", "null", "true", '""', '"a"', '"\\ud800"', '"\\u0000"', '"3"', '"../x"',
    "[]", "[[]]", "[1]", "[null]", '["a"]', "{}", '{"a": 1}', '{"content": 5}', DEEP,
    DEEP.replace("[", '{"a":').replace("]", "}").replace('{"a":}', '{"a":1}'),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value, containers included."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def replaced(dice: random.Random, data: bytes, with_text: str | None = None) -> bytes:
    """JSON with a value somewhere replaced or removed; shallow values are hit more often."""
    document = json.loads(data)
    found = list(places(document))
    depth = min(dice.randint(1, 4), max(map(len, found)))
    path = dice.choice([p for p in found if len(p) == depth] or found)
    if not path:
        return (with_text or dice.choice(EXTREMES)).encode()
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if with_text is None and dice.random() < 0.1:
        del inner[path[-1]]
        return json.dumps(document).encode()
    inner[path[-1]] = "\0here"
    text = with_text or dice.choice(EXTREMES)
    return json.dumps(document).replace('"\\u0000here"', text).encode()


def damaged(dice: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, put in or taken out, or the end cut off."""
    made = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        # the beginning of a binary file decides how the rest is read
        at = dice.randrange(dice.choice((len(made), min(len(made), 300))) or 1)
        match dice.randrange(4):
            case 0 if made:
                made[min(at, len(made) - 1)] ^= 1 << dice.randrange(8)
            case 1:
                made[at:at] = dice.choice((dice.randbytes(3), b"\0", b"\xff", b"[", b'"', b"-9"))
            case 2:
                del made[at : at + dice.randint(1, 9)]
            case _ if dice.random() < 0.2:
                del made[at:]
    return bytes(made)


def long_line(dice: random.Random, data: bytes) -> bytes:
    """A value of 30 MB."""
    return replaced(dice, data, '"' + "a" * 30_000_000 + '"')


class Victim:
    """A file, in a folder that is read as the commands do."""

    def __init__(self, file: Path, read: Callable[[], object], *, is_json: bool = True) -> None:
        self.file, self.read, self.is_json = file, read, is_json
        self.sound = file.read_bytes()


def _model(folder: Path, config: DecoderConfig, more: dict[str, Any]) -> Path:
    model = build(config)
    init_weights(model, 0)
    to_hf(folder, config, model.named_parameters(), max_shard_size=18_000)
    tokenizer = ByteTokenizer(chat_template=TEMPLATE)
    tokenizer.save(folder)
    (folder / "hashes.json").unlink()
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | more))
    generation = {"eos_token_id": [256, 258], "temperature": 0.7, "top_k": 5, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


LLAMA = LlamaConfig(
    vocab_size=260, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=16,
    max_seq_len=32, tie_embeddings=True, sliding_window=8,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=260, hidden_size=16, num_layers=1, num_heads=2, max_seq_len=32)
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32}
CHAT: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": "a", "weight": 0},
                  {"role": "assistant", "content": "b", "train": True}], "id": [1, {"a": None}]},
]  # fmt: skip
PREFERENCES: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": [{"role": "user", "content": "a"}], "answers": ["b", "c"], "ratings": [1, 0.5]},
]
RECIPE = {
    "name": "m", "seed": 3, "run_dir": "runs/m",
    "model": {"family": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2,
              "num_kv_heads": 1, "ffn_size": 16, "max_seq_len": 32},
    "tokenizer": {"kind": "bytes"},
    "engine": {"layout": "dp2.zero2", "precision": "fp32"},
    "stages": [
        {"kind": "pretrain", "steps": 4, "batch": {"global_batch": 2, "seq_len": 16},
         "optimizer": {"lr": 1e-3, "beta1": 0.9}, "data": {"sources": [{"kind": "stdlib"}]},
         "schedule": {"kind": "linear", "warmup_steps": 1}},
        {"kind": "sft", "steps": 2, "batch": {"global_batch": 2, "seq_len": 16},
         "task": {"kind": "count_letters", "targets": "a"}, "num_problems": 8},
    ],
}  # fmt: skip


def _rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def victims(root: Path) -> dict[str, Victim]:
    """By name: the files, and what the commands do with each."""
    llama = _model(root / "llama", LLAMA, {"rope_scaling": ROPE, "architectures": ["Mistral"]})
    gpt2 = _model(root / "gpt2", GPT2, {"layer_norm_epsilon": 1e-5, "n_inner": None})
    tokenizer = ByteTokenizer(chat_template=TEMPLATE)

    def convert_folder(folder: Path) -> None:
        shutil.rmtree(root / "out", ignore_errors=True)
        convert(folder, root / "out")

    def use_tokenizer() -> None:
        found = load_tokenizer(llama)
        found.decode(found.encode("a b\n<|im_end|>", allow_special=True)[:5])
        encode_chat(found, CHAT[0]["messages"])
        assert len(found.byte_lengths) and found.hash and found.stop_ids and found.files()

    def documents(kind: Any, path: Path) -> None:
        list(DataSource(kind=kind, path=path).documents())

    text, lines = root / "a.txt", _rows(root / "a.jsonl", [{"text": "a"}, {"text": "b", "n": 1}])
    text.write_text("one line\nand another: \u00e9\n")
    chat = _rows(root / "chat.jsonl", CHAT)
    preferences = _rows(root / "preferences.jsonl", PREFERENCES)
    recipe = root / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE))
    chat_source = DataSource(kind="chat-jsonl", path=chat)
    ranking_source = DataSource(kind="preference-jsonl", path=preferences)
    found = {
        f"{folder.name}/{name}": Victim(
            folder / name, partial(convert_folder, folder), is_json=".json" in name
        )
        for folder in (llama, gpt2)
        for name in ("config.json", "generation_config.json", "model.safetensors.index.json")
        if (folder / name).exists()
    }
    shard = sorted(llama.glob("*.safetensors"))[1].name
    found["shard"] = Victim(llama / shard, lambda: convert_folder(llama), is_json=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        found[name] = Victim(llama / name, use_tokenizer)
    found["recipe"] = Victim(recipe, lambda: resolved_yaml(load_config(recipe).config))
    found["text"] = Victim(text, lambda: documents("text", text), is_json=False)
    found["jsonl"] = Victim(lines, lambda: documents("jsonl", lines))
    found["chat"] = Victim(chat, lambda: build_chat_examples([chat_source], tokenizer))
    found["preferences"] = Victim(
        preferences, lambda: list(read_rankings([ranking_source], tokenizer))
    )
    return found


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Victim]:
    return victims(tmp_path_factory.mktemp("victims"))


def refused_or_read(victim: Victim, data: bytes, what: str) -> None:
    victim.file.write_bytes(data)
    try:
        victim.read()
    except ShardwiseError:
        pass
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    finally:
        victim.file.write_bytes(victim.sound)


def changed_line(dice: random.Random, victim: Victim, change: Callable[..., bytes]) -> bytes:
    """``change`` of a JSON file, or of one row of a file of rows."""
    if victim.file.suffix != ".jsonl":
        return change(dice, victim.sound)
    rows = victim.sound.splitlines()
    at = dice.randrange(len(rows))
    rows[at] = change(dice, rows[at])
    return b"\n".join(rows)


def test_every_damage_is_refused_or_read(kinds: dict[str, Victim]) -> None:
    for name, victim in kinds.items():
        victim.read()
        for seed in range(SEEDS):
            dice = random.Random(f"{name} {seed}")
            refused_or_read(victim, damaged(dice, victim.sound), f"{name}, bytes, {seed}")
            if victim.is_json:
                data = changed_line(dice, victim, replaced)
                refused_or_read(victim, data, f"{name}, value, {seed}")


@pytest.mark.parametrize("name", ["llama/config.json", "tokenizer.json", "recipe", "chat", "text"])
def test_a_line_of_30_mb_is_refused_or_read(kinds: dict[str, Victim], name: str) -> None:
    victim, dice = kinds[name], random.Random(name)
    long = changed_line(dice, victim, long_line) if victim.is_json else b"a" * 30_000_000
    refused_or_read(victim, long, name)
