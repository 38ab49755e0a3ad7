"""Arrow files and parquet: rows, and what cannot be read, with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.data import streams, tables
from shardwise.data.readers import count_rows, read_rows
from shardwise.errors import DataError
from tests.data.containers import CONTAINERS, write_rows

pa = pytest.importorskip("pyarrow")


@pytest.mark.parametrize("container", [c for c in CONTAINERS if c != "saved"])
def test_rows_and_their_number(tmp_path: Path, container: str) -> None:
    rows = [{"a": i, "b": {"c": "x"} if i % 2 else {"d": "y"}} for i in range(5)]
    path = write_rows(rows, tmp_path, container)
    assert [row for _, row in read_rows([path])] == rows
    assert count_rows(path) == 5
    places = [where.removeprefix(f"{path}: ") for where, _ in read_rows([path])]
    assert places[4].split(", ")[-1] in ("row 4", "byte 104"), places


@pytest.mark.parametrize("container", ["arrow", "feather"])
def test_damaged_arrow_is_named(tmp_path: Path, container: str) -> None:
    path = write_rows([{"a": f"text {i}"} for i in range(9)], tmp_path, container)
    whole = path.read_bytes()
    for damaged in (b"", b"ARROW1", whole[:60], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"rows\.arrow: unreadable arrow .*{len(damaged)} byt"):
            list(read_rows([path]))


def test_text_that_is_none_in_a_table_is_named(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    with pa.ipc.new_stream(str(tmp_path / "b.arrow"), pa.schema({"a": pa.string()})) as writer:
        writer.write_batch(pa.record_batch([bad], names=["a"]))
    with pytest.raises(DataError, match=r"b\.arrow: unreadable arrow at row 0"):
        list(read_rows([tmp_path / "b.arrow"]))


def test_rows_beyond_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW", 100)
    for container in ("json", "parquet", "arrow"):
        path = write_rows([{"a": ["x"]}, {"a": ["x" * 101]}], tmp_path, container)
        with pytest.raises(DataError, match=r"row 1: longer than 100 bytes"):
            list(read_rows([path]))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows([{"a": 1}], tmp_path, "arrow")
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"rows\.arrow: needs pyarrow: pip install"):
        list(read_rows([path]))


def test_an_array_of_json_is_held_to_the_rules(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content, message in (
        ('[{"a": 1}, 2]', "row 1: not a JSON object"),
        ('[{"a": 1}, {"a": "\\ud83d"}]', "row 1: character 0: a lone surrogate"),
        ('[{"a": 1},\n oops]', "byte 12: not JSON"),
        ("[]", "row 0: the input is empty"),
        ("[" * 100_000, "byte 0: not JSON"),
        ("  ", "byte 0: the input is empty"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=rf"a\.json: {message}"):
            list(read_rows([file]))
    file.write_bytes(b'\xef\xbb\xbf [{"a": 1}]')
    assert [row for _, row in read_rows([file])] == [{"a": 1}]
