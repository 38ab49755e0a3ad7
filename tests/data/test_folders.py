"""Folders of data sets, as datasets and the hub lay them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.data.folders import row_files, splits_of
from shardwise.data.source import DataSource
from shardwise.errors import DataError
from tests.data.containers import save_to_disk


def make(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": name}) + "\n")
    return folder


def names(folder: Path, *args: Any) -> list[str]:
    return [f.relative_to(folder).as_posix() for f in row_files(folder, *args)]


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["a.jsonl", "b/c.jsonl"], {"train": ["a.jsonl", "b/c.jsonl"]}),
        (["train.jsonl", "dev.jsonl"], {"train": ["train.jsonl"], "validation": ["dev.jsonl"]}),
        (["train/a.jsonl", "test/a.jsonl"], {"train": ["train/a.jsonl"], "test": ["test/a.jsonl"]}),
        (
            ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
            {
                "train_sft": ["data/train_sft-00000-of-00001.jsonl"],
                "test_sft": ["data/test_sft-00000-of-00001.jsonl"],
            },
        ),
        (
            ["set-train-00000-of-00002.jsonl", "set-train-00001-of-00002.jsonl", "cache-1.jsonl"],
            {"train": ["set-train-00000-of-00002.jsonl", "set-train-00001-of-00002.jsonl"]},
        ),
        (["My-Eval.v2.jsonl", "training_2.jsonl"],
         {"test": ["My-Eval.v2.jsonl"], "train": ["training_2.jsonl"]}),
    ],
)  # fmt: skip
def test_splits_by_name(tmp_path: Path, files: list[str], splits: dict[str, list[str]]) -> None:
    make(tmp_path, *files)
    assert {split: names(tmp_path, split) for split in splits} == splits
    assert sorted(splits_of(tmp_path)) == sorted(splits)
    with pytest.raises(DataError, match=f"has no split nope; it has: .*{next(iter(splits))}"):
        row_files(tmp_path, "nope")


def test_a_readme_says_subsets_and_splits(tmp_path: Path) -> None:
    make(tmp_path, "main/tr-0.jsonl", "main/te-0.jsonl", "extra/all.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - {split: train, path: main/tr-*}\n  - {split: test, path: [main/te-*]}\n"
        "- config_name: extra\n  data_files: extra/*\n---\n# Text\n"
    )
    assert names(tmp_path, "test", "main") == ["main/te-0.jsonl"]
    assert names(tmp_path, "train", "extra") == ["extra/all.jsonl"]
    with pytest.raises(DataError, match="several subsets; say which: main, extra"):
        row_files(tmp_path)
    with pytest.raises(DataError, match="has no subset maim; it has: main, extra"):
        row_files(tmp_path, "train", "maim")
    source = DataSource(path=tmp_path, subset="main", split="test")
    assert [d.text for d in source.documents()] == ["main/te-0.jsonl"]


def test_datasets_own_cache(tmp_path: Path) -> None:
    make(tmp_path, "set-good.jsonl", "set-bad.jsonl")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"splits": {"good": {}, "bad": {}}}))
    assert names(tmp_path, "bad") == ["set-bad.jsonl"]


def test_what_datasets_saved(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": [f"{i}" for i in range(5)]})
    one = save_to_disk(table, tmp_path / "one")
    (one / "cache-12.arrow").write_bytes(b"not of it")
    assert [d.text for d in DataSource(path=one).documents()] == ["0", "1", "2", "3", "4"]
    both = tmp_path / "both"
    for split in ("train", "held"):
        save_to_disk(table.slice(0, 2), both / split)
    (both / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "held"]}))
    assert [d.text for d in DataSource(path=both, split="held").documents()] == ["0", "1"]
    with pytest.raises(DataError, match="has no split test; it has: train, held"):
        row_files(both, "test")
    for said, message in (
        ({"_data_files": [{"filename": "../x.arrow"}]}, "is no list of files"),
        ({"_data_files": [], "_indices_data_files": ["i"]}, "a choice of rows beside them"),
    ):
        (one / "state.json").write_text(json.dumps(said))
        with pytest.raises(DataError, match=rf"state\.json: .*{message}"):
            row_files(one)


def test_datasets_reads_and_writes_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [{"role": "user", "content": f"{i}"}], "id": i} for i in range(7)]
    made = datasets.Dataset.from_list(rows)
    parts = datasets.DatasetDict(train=made, test=made.select([5, 2]))
    parts.save_to_disk(tmp_path / "parts", num_shards={"train": 3, "test": 1})
    for split in parts:
        source = DataSource(kind="messages", path=tmp_path / "parts", split=split)
        assert [row for _, row in source.rows()] == parts[split].to_list()


def test_folders_that_cannot_be_told(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "b.json")
    with pytest.raises(DataError, match=r"files of several kinds \(.json, .jsonl\); .*glob"):
        row_files(tmp_path)
    make(tmp_path / "c", "train.jsonl", "more.jsonl")
    with pytest.raises(DataError, match=r"say of which split they are \(train\), others do not"):
        row_files(tmp_path / "c")
    make(tmp_path / "d", "code.py", "package.json")
    with pytest.raises(DataError, match=r"holds .json files among others; write kind: text"):
        list(DataSource(path=tmp_path / "d").documents())
    with pytest.raises(DataError, match="split test divides a folder of a data set only"):
        row_files(tmp_path / "a.jsonl", "test")
    with pytest.raises(DataError, match="nowhere: no such file"):
        list(DataSource(path=tmp_path / "nowhere").documents())
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "x.txt").write_text("plain")
    assert [d.text for d in DataSource(path=tmp_path / "e").documents()] == ["plain"]
