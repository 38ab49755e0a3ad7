"""What is refused before anything starts, and by which line of the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.errors import ConfigError, DataError
from shardwise.launch.plan import plan_local
from shardwise.launch.train import train
from shardwise.stages.run import prepare_tokenizer
from tests.cli.conftest import write_recipe
from tests.stages.recipes import recipe, run
from tests.support.pool import RankError, RankPool

SFT = "{kind: sft, steps: 1, batch: {seq_len: 16}, data: {%s: [{kind: chat-jsonl, path: no.jsonl}]}"
TASK = ", task: {kind: count_letters}}"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("seq_len: 16", "seq_len: 99"), r"stages\.0\.batch\.seq_len \(.*tiny\.yaml:15\): 99 exc"),
        (("compile: false", "layout: dp3"), r"stages\.0, pretrain \(.*tiny\.yaml:11\): .*dp3"),
        (("train.txt", "gone.txt"), r"sources\.0\.path \(.*tiny\.yaml:17\): .*gone\.txt: no such"),
        (
            ("validation.txt", "x.txt"),
            r"stages\.0\.data\.validation\.0\.path \(.*yaml:18\): .*x\.t",
        ),
        (("name: tiny", "init_from: nowhere"), r"init_from \(.*tiny\.yaml:1\): nowhere does not"),
        (("kind: text", "kind: indexed"), r"train\.txt\.bin: no such file"),
        (
            ("name: tiny", "tokenizer: {kind: file, path: t.json}"),
            r"tokenizer\.path \(.*tiny\.yaml:1\): t\.json does not exist",
        ),
        (
            ("stages:", f"stages:\n  - {SFT % 'sources'}}}"),
            r"stages\.0\.data\.sources\.0\.path \(.*:13\): no\.jsonl: no such",
        ),
        (
            ("stages:", f"stages:\n  - {SFT % 'validation'}{TASK}"),
            r"stages\.0\.data\.validation\.0\.path \(.*:13\): no\.jsonl: no such",
        ),
    ],
)
def test_refused_with_file_and_line(tmp_path: Path, edit: tuple[str, str], message: str) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace(*edit, 1))
    with pytest.raises(ConfigError, match=message):
        plan_local(path, (), 2)
    assert not (tmp_path / "run").exists()


def test_overrides_are_named_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seq_len \(command line override 2\): 65 exceeds"):
        plan_local(write_recipe(tmp_path), ["seed=1", "stages.0.batch.seq_len=65"], 2)


def test_bpe_needs_text(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("kind: text", "kind: indexed", 1))
    with pytest.raises(ConfigError, match=r"tokenizer\.kind \(.*bpe is trained on text"):
        plan_local(path, ["tokenizer.kind=bpe"], 2)


def test_the_data_of_a_finished_stage_may_be_gone(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    result = tmp_path / "run" / "stages" / "pretrain" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    (tmp_path / "train.txt").unlink()
    plan_local(path, (), 2)


def tokenizer_of(config: dict[str, Any], *overrides: str) -> int:
    """The size of a run's tokenizer, made or found as a rank does."""
    loaded = load_config(config, overrides).config
    return prepare_tokenizer(loaded, loaded.directory, 0).vocab_size


def test_another_tokenizer_section_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    bpe = ["tokenizer.kind=bpe", "tokenizer.vocab_size=270"]
    assert ranks.run(tokenizer_of, config, *bpe, world=1) == [270]
    assert ranks.run(tokenizer_of, config, *bpe, world=1) == [270]
    for other in (["tokenizer.kind=bytes"], [*bpe, "tokenizer.vocab_size=280"]):
        with pytest.raises(RankError, match=r"made from another tokenizer section.*run_dir"):
            ranks.run(run, config, *other, world=1)
    marker = tmp_path / "run" / "tokenizer" / "ready"
    marker.write_bytes(b"")  # as older runs left it
    assert ranks.run(tokenizer_of, config, "tokenizer.kind=bytes", world=1) == [270]


def test_a_changed_tokenizer_file_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    ranks.run(tokenizer_of, config, world=1)
    file = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    config = recipe(tmp_path / "other", "pretrain") | {
        "tokenizer": {"kind": "file", "path": str(file)}
    }
    ranks.run(tokenizer_of, config, world=1)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": "1.0 "}))
    with pytest.raises(RankError, match="or its file has changed"):
        ranks.run(tokenizer_of, config, world=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "q " * 99}]}, "has 2.. tokens, more than"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "a lone surrogate is no text"),
    ],
)
def test_samples_are_read_before_anything_starts(
    row: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row["messages"].append({"role": "assistant", "content": "x"})
    good = {"messages": [{"role": "user", "content": "q"}, row["messages"][1]]}
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n")
    data = {"sources": [{"kind": "chat-jsonl", "path": str(tmp_path)}]}
    config = recipe(tmp_path / "run", "pretrain")
    sft = {
        "kind": "sft",
        "steps": 1,
        "batch": {**config["stages"][0]["batch"], "seq_len": 32},
        "data": data,
    }
    config["stages"].append(sft)
    for started in ("launch_local", "train_rank"):
        monkeypatch.setattr(f"shardwise.launch.train.{started}", lambda *a: pytest.fail("started"))
    with pytest.raises(DataError, match=rf"b\.jsonl: line 3, byte \d+.*{message}"):
        train(config, nproc=2)
    assert not (tmp_path / "run").exists()
