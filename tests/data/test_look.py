"""What `shardwise data inspect` shows of rows, and what `data prepare` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shardwise.cli.main import app
from shardwise.data.chat import CHATML
from shardwise.data.look import look
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import DataError
from tests.data.containers import write_rows

PLAIN = ByteTokenizer(CHATML)
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "format", "pieces"),
    [
        (SHAREGPT, "sharegpt", [(ASKED, False), ("ho<|im_end|>", True), ("\n", False)]),
        ({"text": "hi"}, "documents", [("hi", True)]),
        ({"prompt": "hi", "chosen": "ho", "rejected": "no"}, "preference",
         [(ASKED, False), ("ho<|im_end|>", True)]),
        ({"prompt": "hi", "answer": 3}, "problems", [('{"prompt": "hi", "answer": 3}', False)]),
    ],
)  # fmt: skip
def test_rows_as_they_are_learned(tmp_path: Path, row: Any, format: str, pieces: Any) -> None:
    path = write_rows([row] * 3, tmp_path, "json")
    found = look(path, PLAIN, num_samples=1)
    assert (found.format, found.num_rows, found.container) == (format, 3, "json")
    assert found.samples[0].pieces == pieces


def test_a_mapping_that_mends(tmp_path: Path) -> None:
    path = write_rows([{"question": "hi", "reply": "ho"}], tmp_path, "jsonl")
    with pytest.raises(DataError, match=r"prompt-completion with columns: {prompt: question, comp"):
        look(path, PLAIN)
    columns = {"prompt": "question", "completion": "reply"}
    found = look(path, PLAIN, columns=columns, raw=True)
    assert found.columns == columns
    assert found.samples[0].pieces == [("hi", False), ("ho<|endoftext|>", True)]


def test_the_command(tmp_path: Path) -> None:
    path = write_rows([SHAREGPT], tmp_path, "jsonl")
    done = CliRunner().invoke(app, ["data", "inspect", str(path)])
    assert done.exit_code == 0, done.output
    assert "sharegpt (conversations: from/value) in 1 jsonl file, 1 rows" in done.output
    assert "columns: conversations" in done.output and "[[ho<|im_end|>]]" in done.output
    done = CliRunner().invoke(app, ["data", "inspect", str(path), "--json", "-"])
    assert json.loads(done.output)["format"] == "sharegpt"
    for options, message in (
        (["--kind", "nope"], "--kind nope: allowed: auto, preference"),
        (["--column", "prompt"], "--column prompt: write OURS=THEIRS"),
        (["--column", "messages=x"], "columns.messages: no column 'x'"),
        (["--kind", "alpaca"], "of the format sharegpt, which is not read here"),
    ):
        done = CliRunner().invoke(app, ["data", "inspect", str(path), *options])
        assert done.exit_code != 0 and message in f"{done.output}{done.exception}", options


def test_conversations_are_prepared(tmp_path: Path) -> None:
    path = write_rows([SHAREGPT], tmp_path, "jsonl")
    command = ["data", "prepare", str(path), "--kind", "sharegpt", "-o", str(tmp_path / "store")]
    assert CliRunner().invoke(app, command).exit_code == 0
    done = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "store")])
    assert "1 documents, 26 tokens of uint16, ids 10 to 258" in done.output, done.output
