"""Readers: what they yield, and how they name the place where input stops being readable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.data import readers
from shardwise.errors import DataError

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


def test_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full, empty = tmp_path / "full.txt", tmp_path / "empty.txt"
    full.write_bytes("né\r\n\n".encode())
    empty.write_bytes(b"")
    [document] = readers.read_text([empty, full])
    assert document.text == "né\r\n\n" and document.raw == full.read_bytes()
    assert "empty.txt: empty file skipped" in caplog.text
    with pytest.raises(DataError, match=r"empty\.txt: byte 0: the input is empty"):
        list(readers.read_text([empty]))
    full.write_bytes(b"fine so far \xff\xfe")
    with pytest.raises(DataError, match=r"full\.txt: byte 12: not UTF-8"):
        list(readers.read_text([full]))


@given(st.lists(TEXT, min_size=1, max_size=8))
@settings(max_examples=30)
def test_jsonl_and_parquet_round_trip(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("rt")
    lines = [json.dumps({"body": t, "n": i}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8", newline="\n")
    found = list(readers.read_documents([folder / "a.jsonl"], "body"))
    assert [d.text for d in found] == texts
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pa.table({"body": texts, "n": range(len(texts))}), folder / "a.parquet"
    )
    found = list(readers.read_documents([folder / "a.parquet"], "body"))
    assert [d.text for d in found] == texts
    assert found[-1].name.endswith(f"a.parquet:{len(texts) - 1}")


GOOD = b'{"text": "\xc3\xa9"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"\n', r"line 2, byte 28: not JSON"),
        (b'{"text": "\xc3\xa9", oops}\n', r"line 2, byte 30: not JSON"),
        (b'{"text": "\xff"}\n', r"line 2, byte 25: not UTF-8"),
        (b"[1]\n", r"line 2, byte 15: not a JSON object"),
        (b'{"txet": "x"}\n', r"line 2, byte 15: field 'text' is not a string; fields: txet"),
        (b'{"text": 3}\n', r"line 2, byte 15: field 'text' is not a string"),
        (b'{"text": "\\ud800"}\n', r"line 2, byte 15: character 0: a lone surrogate"),
    ],
)
def test_bad_jsonl_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(GOOD + line)
    with pytest.raises(DataError, match=rf"bad\.jsonl: {message}"):
        list(readers.read_documents([tmp_path / "bad.jsonl"]))


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"text": ""}\n'])
def test_empty_jsonl(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "e.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"e\.jsonl: byte 0: "):
        list(readers.read_documents([tmp_path / "e.jsonl"]))


def test_empty_rows_are_skipped_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "e.jsonl").write_bytes(b'{"text": ""}\n{"text": "x"}\n')
    assert [d.text for d in readers.read_documents([tmp_path / "e.jsonl"])] == ["x"]
    assert "line 1, byte 0: empty document skipped" in caplog.text


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    file = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pa.table({"a": ["x", None], "n": [1, 2]}), file)
    whole = file.read_bytes()
    for field, message in (
        ("b", "no column 'b'; columns: a, n"),
        ("a", "row group 0, row 1: column 'a' holds no"),
    ):
        with pytest.raises(DataError, match=rf"t\.parquet: {message}"):
            list(readers.read_documents([file], field))
    with pytest.raises(DataError, match="row 0: column 'n' holds no string"):
        list(readers.read_documents([file], "n"))
    for damaged in (b"", b"PAR1", whole[:-3], whole[:40] + whole[60:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"t\.parquet: unreadable .*{len(damaged)} bytes"):
            list(readers.read_documents([file], "a"))


def test_json_nested_beyond_reason_is_an_error_of_the_data(tmp_path: Path) -> None:
    file = tmp_path / "deep.jsonl"
    file.write_text('{"text": "fine"}\n' + "[" * 200_000)
    with pytest.raises(DataError, match=r"deep\.jsonl: line 2, byte 17: not JSON"):
        list(readers.read_documents([file]))
