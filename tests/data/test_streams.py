"""Compressed files: what they hold, whole or refused, within bounds."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.data import readers, streams
from shardwise.data.formats import DOCUMENTS
from shardwise.data.source import DataSource
from shardwise.errors import DataError

zstandard = pytest.importorskip("zstandard")

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("suffix", PACK)
@settings(max_examples=15, deadline=None)
@given(parts=st.lists(st.binary(max_size=300), min_size=1, max_size=4), big=st.booleans())
def test_members_are_read_one_after_another(
    suffix: str, parts: list[bytes], big: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("s") / ("x" + suffix)
    if big:
        parts = [*parts, b"line\n" * 200_000]
    file.write_bytes(b"".join(PACK[suffix](p) for p in parts))
    assert b"".join(streams.blocks(file)) == b"".join(parts)
    assert b"".join(streams.lines(file)) == b"".join(parts)


@pytest.mark.parametrize("suffix", PACK)
def test_damage_is_named(suffix: str, tmp_path: Path) -> None:
    """Cut anywhere, or with something else behind: never an early end."""
    file = tmp_path / ("x" + suffix)
    whole = PACK[suffix](os.urandom(300) + b"abc" * 100)
    for data in [*(whole[:k] for k in range(1, len(whole), 7)), whole + b"garbage", b"no stream"]:
        file.write_bytes(data)
        with pytest.raises(DataError, match=rf"x\{suffix}: byte \d+: the \w+ stream"):
            list(streams.blocks(file))


@pytest.mark.parametrize("suffix", PACK)
def test_bombs_are_refused_in_bounded_memory(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / ("x.txt" + suffix)
    file.write_bytes(PACK[suffix](bytes(1 << 27)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="expands to more than 200 times its size"):
        for _ in streams.blocks(file):
            pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert sum(map(len, streams.blocks(file, 1e9))) == 1 << 27


def test_sources_read_what_is_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "one"}\n'))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "two"}\r\n'))
    source = DataSource(kind="jsonl", path=tmp_path)
    source.check(DOCUMENTS)
    assert [d.text for d in source.documents()] == ["one", "two"]
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(b'{"text": "x"}\n{'))
    with pytest.raises(DataError, match=r"c\.jsonl\.xz: line 2, byte 15: not JSON"):
        list(source.documents())
    text = DataSource(kind="text", path=tmp_path / "t.txt.bz2")
    (tmp_path / "t.txt.bz2").write_bytes(bz2.compress("né\r\n".encode()))
    assert [d.text for d in text.documents()] == ["né\r\n"]


def test_zstd_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"x"))
    monkeypatch.setattr(streams, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"a\.txt\.zst: zstd needs zstandard: pip install"):
        DataSource(kind="text", path=tmp_path).check(DOCUMENTS)


def test_byte_order_marks_and_other_encodings(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfhi\xef\xbb\xbf")
    assert [d.text for d in readers.read_text([file])] == ["hi\ufeff"]
    file.write_bytes("hi".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.txt: byte 0: not UTF-8 .*UTF-16: convert it"):
        list(readers.read_text([file]))


def test_fields_of_documents_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "url": "u"}\n' * 2)
    source = DataSource(kind="jsonl", path=tmp_path)
    assert len(list(source.documents())) == 2
    assert "url (2 rows)" in caplog.text
    with pytest.raises(DataError, match=r"line 1, byte 0: nothing reads the fields url"):
        list(source.documents(strict=True))
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["x"], "n": [1]}), tmp_path / "a.parquet")
    rows = DataSource(kind="parquet", path=tmp_path / "a.parquet", ignore=["n"])
    assert len(list(rows.documents(strict=True))) == 1
    with pytest.raises(DataError, match="fields n"):
        list(DataSource(kind="parquet", path=tmp_path / "a.parquet").documents(strict=True))


def test_very_long_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * (3 << 20))
    with pytest.raises(DataError, match="line 2: longer than 1,048,576 bytes"):
        list(DataSource(kind="jsonl", path=tmp_path / "a.jsonl").documents())
    monkeypatch.setattr(streams, "MAX_ROW", 1 << 10)  # conversations take more memory a byte
    (tmp_path / "b.jsonl").write_bytes(b'{"a": "' + b"x" * (1 << 10) + b'"}\n')
    with pytest.raises(DataError, match=r"line 1: longer than .* split"):
        list(DataSource(kind="chat-jsonl", path=tmp_path / "b.jsonl").rows())
    monkeypatch.setattr(streams, "MAX_TEXT", 1 << 20)  # a file that is one document
    (tmp_path / "a.txt").write_bytes(b"x\n" * (1 << 19))
    assert list(DataSource(kind="text", path=tmp_path / "a.txt").documents())
    (tmp_path / "a.txt").write_bytes(b"x\n" * (1 << 20))
    with pytest.raises(DataError, match=r"a\.txt: byte 1048576: one document of more than 1 MiB"):
        list(DataSource(kind="text", path=tmp_path / "a.txt").documents())
