"""One source: its files, its documents and its fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from shardwise.data.formats import DOCUMENTS
from shardwise.data.source import DataSource
from shardwise.errors import DataError, UserError


def test_needs_a_path() -> None:
    with pytest.raises(ValidationError, match="a source of kind jsonl needs a path"):
        DataSource(kind="jsonl")
    assert DataSource().label == "stdlib:train"


def test_each_kind_reads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("from a text file")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "from jsonl"}) + "\n")
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["from parquet"]}), tmp_path / "c.parquet")
    sources = [
        DataSource(kind="text", path=tmp_path / "*.txt"),
        DataSource(kind="jsonl", path=tmp_path, field="body"),
        DataSource(kind="parquet", path=tmp_path),
    ]
    texts = [[d.text for d in s.documents()] for s in sources]
    assert texts == [["from a text file"], ["from jsonl"], ["from parquet"]]
    with pytest.raises(UserError, match="holds no plain documents"):
        DataSource(kind="preference-jsonl", path=tmp_path).documents()


def test_exclude(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    source = DataSource(kind="text", path=tmp_path, exclude=["b.*"])
    assert [d.text for d in source.documents()] == ["a.txt"]
    with pytest.raises(DataError, match="exclude leaves none of its 2 files"):
        DataSource(kind="text", path=tmp_path, exclude=["*.txt"]).files()


def test_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    source = DataSource(kind="jsonl", path=tmp_path)
    before = source.fingerprint()
    assert DataSource(kind="jsonl", path=tmp_path, field="body").fingerprint() != before
    (tmp_path / "a.jsonl").write_text('{"text": "y"}\n')
    assert source.fingerprint() != before
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert source.fingerprint() == before


@pytest.mark.parametrize("split", ["validation", "all"])
def test_only_the_standard_library_has_a_split(split: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=f"split {split} divides the standard library only"):
        DataSource(kind="text", path=tmp_path, split=split)  # type: ignore[arg-type]
    DataSource(kind="text", path=tmp_path, split="train")  # as a resolved recipe writes it


def test_check_opens_nothing_but_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("text", "jsonl", "indexed", "chat-jsonl"):
        with pytest.raises(DataError, match="nowhere"):
            DataSource(kind=kind, path=tmp_path / "nowhere").check(DOCUMENTS)  # type: ignore[arg-type]
    (tmp_path / "a.parquet").write_text("not read")
    DataSource(kind="parquet", path=tmp_path).check(DOCUMENTS)
    DataSource().check(DOCUMENTS)
    (tmp_path / "b.txt").write_text("")
    for kind, name in (("text", "a.parquet"), ("chat-jsonl", "a.parquet"), ("parquet", "b.txt")):
        with pytest.raises(DataError, match=f"{name}: a .* file is not of kind {kind}"):
            DataSource(kind=kind, path=tmp_path / name).check(DOCUMENTS)  # type: ignore[arg-type]
    monkeypatch.setattr("shardwise.data.tables.find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs pyarrow"):
        DataSource(kind="parquet", path=tmp_path).check(DOCUMENTS)
