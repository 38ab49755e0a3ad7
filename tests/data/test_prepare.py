"""`data prepare` and `data inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shardwise.data.indexed import IndexedStore, IndexedWriter
from shardwise.data.prepare import inspect, prepare
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import DataError

BYTES = ByteTokenizer()


def _jsonl(path: Path, texts: list[str], tail: str = "") -> DataSource:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts) + tail)
    return DataSource(kind="jsonl", path=path)


def test_prepare_and_inspect(tmp_path: Path) -> None:
    texts = ["a" * n for n in (1, 2, 5, 5, 40)]
    source = _jsonl(tmp_path / "in.jsonl", texts)
    seen = []
    report = prepare([source, source], BYTES, tmp_path / "out" / "store", progress=seen.append)
    assert (report.num_documents, report.num_tokens, report.num_bytes) == (10, 116, 106)
    assert seen[-1] == report and report.bytes_per_token == 106 / 116
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["store.bin", "store.idx", "store.store.json", "store.tokenizer"]
    store = IndexedStore(tmp_path / "out" / "store")
    assert [store[i].tolist() for i in range(5)] == [[*t.encode(), BYTES.eos_id] for t in texts]

    for path in ("store", "store.bin", "store.idx"):
        found = inspect(tmp_path / "out" / path, num_samples=2, sample_tokens=2)
        assert (found.num_documents, found.num_tokens, found.num_bytes) == (10, 116, 106)
        assert [(s.ids, s.text) for s in found.samples] == [([97, 256], "a"), ([97, 97], "aa")]
        assert found.length_histogram == [
            (0, 1, 0), (1, 2, 0), (2, 4, 4), (4, 8, 4), (8, 16, 0), (16, 32, 0), (32, 64, 2)
        ]  # fmt: skip
        assert found.length_percentiles["p50"] == 6 and found.length_mean == 11.6
        assert (found.smallest_id, found.largest_id, found.dtype) == (97, 256, "uint16")
        assert found.manifest is not None and found.manifest["tokenizer_hash"] == BYTES.hash


def test_inspect_a_foreign_store(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "m", np.int32) as writer:
        writer.add([104, 105])
    plain = inspect(tmp_path / "m")
    assert plain.samples[0].text is None and plain.manifest is None and plain.num_bytes is None
    assert inspect(tmp_path / "m", BYTES).samples[0].text == "hi"


@pytest.mark.parametrize("tail", ['{"text": ', '{"text": 5}\n'])
def test_broken_input_leaves_nothing(tmp_path: Path, tail: str) -> None:
    source = _jsonl(tmp_path / "in.jsonl", ["x" * 2_000_000, "y"], tail)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"in\.jsonl: line 3, byte \d+: "):
        prepare([source], BYTES, tmp_path / "out" / "store")
    assert list((tmp_path / "out").iterdir()) == []


def test_broken_input_keeps_the_older_store(tmp_path: Path) -> None:
    prepare([_jsonl(tmp_path / "in.jsonl", ["x"])], BYTES, tmp_path / "out" / "store")
    before = inspect(tmp_path / "out" / "store")
    with pytest.raises(DataError):
        prepare([_jsonl(tmp_path / "in.jsonl", ["y"], "{")], BYTES, tmp_path / "out" / "store")
    assert inspect(tmp_path / "out" / "store") == before


def test_the_content_hash_follows_text_and_tokenizer(tmp_path: Path) -> None:
    def content_hash(texts: list[str], tokenizer: ByteTokenizer) -> str:
        prepare([_jsonl(tmp_path / "in.jsonl", texts)], tokenizer, tmp_path / "s")
        manifest = inspect(tmp_path / "s").manifest
        assert manifest is not None
        return str(manifest["content_hash"])

    other = ByteTokenizer(chat_template="{{ x }}")
    hashes = [
        content_hash(["ab", "c"], BYTES),
        content_hash(["a", "bc"], BYTES),
        content_hash(["ab", "c"], other),
    ]
    assert len(set(hashes)) == 3 and content_hash(["ab", "c"], BYTES) == hashes[0]


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "corpus.json", ["a", "b"])
    before = (tmp_path / "corpus.json").read_bytes()
    prepare([source], BYTES, tmp_path / "corpus")
    assert (tmp_path / "corpus.json").read_bytes() == before
    for name in ("x.bin", "x.store.json", "x.tokenizer/notes.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        source = _jsonl(tmp_path / name, ["mine"])
        with pytest.raises(DataError, match="is an input and would be written over"):
            prepare([source], BYTES, tmp_path / "x")
        assert "mine" in (tmp_path / name).read_text()
        (tmp_path / name).unlink()


def test_ids_that_cannot_be_are_named(tmp_path: Path) -> None:
    for bad in (-7, 2**40):
        with IndexedWriter(tmp_path / "s", np.int64) as writer:
            writer.add([1, 2])
        ids = np.array([1, bad], dtype="<i8")
        (tmp_path / "s.bin").write_bytes(ids.tobytes())
        with pytest.raises(DataError, match=rf"s\.bin: byte 8: {bad} is no token id"):
            inspect(tmp_path / "s", BYTES)
