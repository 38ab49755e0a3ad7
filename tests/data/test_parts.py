"""Rows held out: what is asked decides, whatever the format, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.data.config import Reading
from shardwise.data.datasets import build_chat_examples
from shardwise.data.parts import WHOLE, Part
from shardwise.data.preferences import read_rankings
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import ConfigError

BOTH = Part(0.3), Part(0.3, held_out=True)


def source(folder: Path, kind: str, rows: list[dict[str, Any]]) -> DataSource:
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource.model_validate({"kind": kind, "path": file})


def test_a_share_is_held_out() -> None:
    train, held_out = BOTH
    asked = [f"question {i}" for i in range(2000)]
    assert all(train.has(a) != held_out.has(a) for a in asked)
    assert 0.25 < sum(map(held_out.has, asked)) / 2000 < 0.35
    assert all(WHOLE.has(a) for a in asked) and not Part(0.0, held_out=True).has("a")
    larger = Part(0.5, held_out=True)
    assert all(larger.has(a) for a in asked if held_out.has(a)), "a larger share holds a smaller"


def test_conversations(tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": f"{i % 40}?"}, {"role": "assistant", "content": f"{i}"}]
        for i in range(80)
    ]
    sources = {
        "messages": [{"messages": t} for t in turns],
        "prompt-completion": [
            {"prompt": t[0]["content"], "completion": t[1]["content"]} for t in turns
        ],
    }
    found = {}
    for kind, rows in sources.items():
        given, tokenizer = source(tmp_path, kind, rows), ByteTokenizer()
        parts = [build_chat_examples([given], tokenizer, part=part) for part in BOTH]
        whole = build_chat_examples([given], tokenizer)
        assert sorted(e.where for p in parts for e in p) == sorted(e.where for e in whole)
        rows_of = [{int(e.where.split("line ")[1].split(",")[0]) - 1 for e in p} for p in parts]
        assert all(rows_of) and not {r % 40 for r in rows_of[0]} & {r % 40 for r in rows_of[1]}
        found[kind] = rows_of
        raw = [build_chat_examples([given], tokenizer, texts="raw", part=p) for p in BOTH]
        assert sum(map(len, raw)) == 80 and all(raw)
    assert found["messages"] == found["prompt-completion"], "the same rows in any format"


def test_rankings(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 40}?", "chosen": f"{i}", "rejected": "no"} for i in range(80)]
    given, tokenizer = source(tmp_path, "preference", rows), ByteTokenizer()
    for raw in (False, True):
        how = Reading(raw=raw)
        parts = [
            list(read_rankings([given], tokenizer, dataclasses.replace(how, part=p))) for p in BOTH
        ]
        assert sum(map(len, parts)) == 80 and all(parts)
        prompts = [{tuple(r.prompt) for r in p} for p in parts]
        assert not prompts[0] & prompts[1]


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_one_way_to_validate(tmp_path: Path, kind: str) -> None:
    form = "messages" if kind == "sft" else "preference"
    data = {"sources": [{"kind": form, "path": "a"}], "held_out": 0.1}
    recipe = {
        "model": {"family": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 1,
                  "num_kv_heads": 1, "ffn_size": 8},
        "stages": [{"kind": kind, "steps": 1, "data": data}],
    }  # fmt: skip
    assert load_config(recipe).config.stages[0].data.held_out == 0.1  # type: ignore[attr-defined]
    data["validation"] = [{"kind": form, "path": "b"}]
    with pytest.raises(ConfigError, match="not both"):
        load_config(recipe)
