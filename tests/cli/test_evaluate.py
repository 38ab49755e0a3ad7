"""`shardwise evaluate` on folders that no run of ours made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwise.checkpoint.convert import convert
from tests.cli.conftest import Command
from tests.models.test_travel import write_folder
from tests.support.hub import HubCache

ROWS = [
    {"query": "The sky is", "choices": ["blue", "made of cheese"], "answer": "A"},
    {"query": "Two and two are", "choices": ["five", "four"], "answer": 1},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "hf")
    (tmp_path / "plain.txt").write_text("Some text that is to be predicted. " * 20)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "hf"


def test_any_form_of_a_model_gives_the_same_figures(
    shardwise: Command, folder: Path, tmp_path: Path, hub_cache: HubCache
) -> None:
    convert(folder, tmp_path / "native", "native")
    hub_cache.add("org/name", folder)
    asked = [
        "--bits-per-byte", tmp_path / "plain.txt", "--bits-per-byte", tmp_path / "plain.txt",
        "--multiple-choice", tmp_path / "rows.jsonl", "--column", "question=query",
        "--seq-len", "64",
    ]  # fmt: skip
    found = []
    for name in (folder, tmp_path / "native", "hf:org/name"):
        code, out, _ = shardwise("evaluate", name, *asked, "--json", "-")
        assert code == 0
        figures = json.loads(out)
        found.append({k: v for k, v in figures.items() if not k.endswith("_seconds")})
    assert found[0] == found[1] == found[2]
    assert found[0]["num_questions"] == 2 and found[0]["choice_chance"] == 0.5
    assert 7 < found[0]["val_bits_per_byte"] < 9  # of 256 bytes, untrained
    assert found[0]["bits_per_byte_2.val_bits_per_byte"] == found[0]["val_bits_per_byte"]
    code, out, _ = shardwise("evaluate", folder, *asked, "--precision", "bf16")
    assert code == 0 and "choice_accuracy_norm: " in out


def test_problems_of_a_file(shardwise: Command, folder: Path, tmp_path: Path) -> None:
    rows = [{"q": f"How many are {i} and {i}?", "answer": str(2 * i)} for i in range(9)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--problems", tmp_path / "problems.jsonl", "--column", "prompt=q"]
    code, out, err = shardwise("evaluate", folder, *asked, "--max-new-tokens", "3", "--json", "-")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["num_problems"] == 9 and figures["accuracy"] == 0.0
    assert {s["prompt"] for s in figures["samples"]} <= {row["q"] for row in rows}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ([], "say what to measure (--bits-per-byte"),
        (["--multiple-choice", "{rows}"], "{rows}: line 1, byte 0: no field 'question'; fields: q"),
        (["--multiple-choice", "{none}"], "{none}"),
        (["--bits-per-byte", "{none}"], "data.validation.0.path: {none}"),
        (["--lm-eval", "{none}.yaml"], "{none}.yaml: no such file"),
        (["--multiple-choice", "{rows}", "--column", "question"], "--column question: write OURS"),
        (["--bits-per-byte", "{rows}", "--precision", "int4"], "--precision int4: allowed"),
    ],
)
def test_what_cannot_be_measured(
    shardwise: Command, folder: Path, tmp_path: Path, change: list[str], words: str
) -> None:
    names = {"rows": tmp_path / "rows.jsonl", "none": tmp_path / "none"}
    before = sorted(tmp_path.rglob("*"))
    code, out, err = shardwise("evaluate", folder, *(c.format(**names) for c in change))
    assert (code, out) == (2, "") and words.format(**names) in err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_model(
    shardwise: Command, folder: Path, tmp_path: Path, hub_cache: HubCache
) -> None:
    asked = ["--bits-per-byte", tmp_path / "plain.txt"]
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    for name, words in (
        (folder, "config.json: model_type 'mamba' is not supported"),
        (tmp_path / "plain.txt", "plain.txt: not a GGUF file"),
        (tmp_path / "none", "none does not exist"),
        ("hf:org/none", "HF_HUB_OFFLINE"),
    ):
        code, out, err = shardwise("evaluate", name, *asked)
        assert (code, out) == (2, "") and words in err
