"""The token store against bytes written by hand from Megatron's format, and against damage."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.data import indexed
from shardwise.data.indexed import (
    IndexedStore,
    IndexedWriter,
    read_manifest,
    store_paths,
    token_dtype,
)
from shardwise.errors import DataError

MANIFEST = {"format": 1, "content_hash": "x", "num_bytes": 3}
DOCUMENTS = st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=20)

# Two documents, of sequences [1, 2], [3] and [700, 65535, 0], as Megatron writes them in uint16.
GOLDEN_BIN = bytes.fromhex("010002000300bc02ffff0000")
GOLDEN_IDX = (
    b"MMIDIDX\x00\x00"
    + bytes.fromhex("0100000000000000")  # version
    + bytes.fromhex("08")  # uint16
    + bytes.fromhex("0300000000000000")  # sequences
    + bytes.fromhex("0300000000000000")  # document indices
    + bytes.fromhex("020000000100000003000000")
    + bytes.fromhex("000000000000000004000000000000000600000000000000")
    + bytes.fromhex("000000000000000002000000000000000300000000000000")
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_writes_the_golden_bytes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "g", np.uint16) as writer:
        writer.add_document([[1, 2], [3]])
        writer.add(np.array([700, 65535, 0]))
    assert (tmp_path / "g.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "g.idx").read_bytes() == GOLDEN_IDX
    assert names(tmp_path) == ["g.bin", "g.idx"]


@pytest.mark.parametrize("name", ["g", "g.bin", "g.idx"])
@pytest.mark.parametrize("modes", [b"", b"\x00\x01\x00"])  # multimodal stores append a mode each
def test_reads_the_golden_bytes(tmp_path: Path, name: str, modes: bytes) -> None:
    (tmp_path / "g.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "g.idx").write_bytes(GOLDEN_IDX + modes)
    store = IndexedStore(tmp_path / name)
    assert [store[i].tolist() for i in range(len(store))] == [[1, 2, 3], [700, 65535, 0]]
    assert store.lengths.tolist() == [3, 3]
    assert isinstance(store.tokens, np.memmap)


def test_megatron_reads_what_we_write(tmp_path: Path) -> None:
    """The peer's own reader, where it is installed."""
    peer = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [[5, 6, 7], [8], [9, 10]]
    with IndexedWriter(tmp_path / "m", np.uint16) as writer:
        for ids in documents:
            writer.add(ids)
    theirs = peer.IndexedDataset(str(tmp_path / "m"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]


@given(DOCUMENTS, st.sampled_from([np.uint16, np.int32, np.int64]))
@settings(max_examples=40)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, docs: list, dtype: type) -> None:
    prefix = tmp_path_factory.mktemp("rt") / "s"
    if not any(docs):
        with pytest.raises(DataError, match="no tokens"), IndexedWriter(prefix, dtype) as writer:
            for ids in docs:
                writer.add(ids)
        assert names(prefix.parent) == []
        return
    with IndexedWriter(prefix, dtype) as writer:
        for ids in docs:
            writer.add(ids)
        assert (writer.num_documents, writer.num_tokens) == (len(docs), sum(map(len, docs)))
    store = IndexedStore(prefix)
    assert [store[i].tolist() for i in range(len(store))] == docs


@given(DOCUMENTS, st.integers(0, 20), st.booleans())
@settings(max_examples=40)
def test_an_error_leaves_nothing_behind(
    tmp_path_factory: pytest.TempPathFactory, docs: list, fail_at: int, exists: bool
) -> None:
    folder = tmp_path_factory.mktemp("err")
    if exists:
        with IndexedWriter(folder / "s", np.uint16) as writer:
            writer.add([1, 2, 3])
            writer.manifest = dict(MANIFEST)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with (
        pytest.raises(DataError, match="do not fit"),
        IndexedWriter(folder / "s", np.uint16) as writer,
    ):
        for ids in docs[:fail_at]:
            writer.add(ids)
        writer.add([65536])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("kill_at", range(7))
def test_a_crash_inside_the_commit_never_pairs_old_with_new(
    tmp_path: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every file operation of the commit: the old store, no store, or the new store."""
    with IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add([1, 2, 3])
        writer.manifest = MANIFEST | {"which": "old"}

    class Killed(BaseException):
        pass

    calls = 0

    def counted(original):  # type: ignore[no-untyped-def]
        def call(self: Path, *args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls
            if not (self.name.endswith(".tmp") and original is unlink):
                if calls == kill_at:
                    raise Killed
                calls += 1
            return original(self, *args, **kwargs)

        return call

    unlink, replace = Path.unlink, Path.replace
    writer = IndexedWriter(tmp_path / "s", np.uint16)
    killed = False
    try:
        with writer:
            writer.add([7, 8, 9])
            writer.manifest = MANIFEST | {"which": "new"}
            monkeypatch.setattr(Path, "unlink", counted(unlink))
            monkeypatch.setattr(Path, "replace", counted(replace))
    except Killed:
        killed = True
    monkeypatch.undo()
    assert killed == (kill_at < 5)  # two removals, three renames
    if store_paths(tmp_path / "s")[1].exists():
        expected = {"old": [1, 2, 3], "new": [7, 8, 9]}
        manifest = read_manifest(tmp_path / "s")
        assert manifest is not None
        assert IndexedStore(tmp_path / "s")[0].tolist() == expected[manifest["which"]]
    else:
        assert read_manifest(tmp_path / "s") is None
        with pytest.raises(DataError):
            IndexedStore(tmp_path / "s")


def _damaged(folder: Path, idx: bytes = GOLDEN_IDX, tokens: bytes = GOLDEN_BIN) -> Path:
    (folder / "d.bin").write_bytes(tokens)
    (folder / "d.idx").write_bytes(idx)
    return folder / "d"


def _patched(offset: int, value: bytes) -> bytes:
    return GOLDEN_IDX[:offset] + value + GOLDEN_IDX[offset + len(value) :]


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (b"", "byte 0: truncated inside the header"),
        (GOLDEN_IDX[:33], "byte 33: truncated inside the header"),
        (GOLDEN_IDX[:-1], f"byte {len(GOLDEN_IDX) - 1}: .*truncated"),
        (GOLDEN_IDX + b"12", f"byte {len(GOLDEN_IDX)}: "),
        (_patched(0, b"X"), "byte 0: not a token index"),
        (_patched(9, b"\x02"), "byte 9: version 2"),
        (_patched(17, b"\x07"), "byte 17: dtype code 7"),
        (_patched(17, b"\x63"), "byte 17: dtype code 99"),
        (_patched(18, b"\xff" * 8), "truncated or corrupt"),
        (_patched(26, b"\xff" * 8), "truncated or corrupt"),
        (_patched(38, struct.pack("<i", -1)), "byte 38: a negative length"),
        (_patched(38, struct.pack("<i", 2)), "byte 62: an offset that does not follow"),
        (_patched(54, struct.pack("<q", 5)), "byte 54: an offset"),
        (_patched(78, struct.pack("<q", 9)), "byte 86: a document index out of order"),
        (_patched(70, struct.pack("<q", 1)), "byte 70: documents do not span 0 to 3"),
        (_patched(86, struct.pack("<q", 2)), "byte 70: documents do not span"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, idx: bytes, message: str) -> None:
    prefix = _damaged(tmp_path, idx)
    with pytest.raises(DataError, match=rf"d\.idx: .*{message}"):
        IndexedStore(prefix)


@pytest.mark.parametrize("tokens", [b"", GOLDEN_BIN[:-2], GOLDEN_BIN + b"\x00\x00"])
def test_a_bin_of_the_wrong_size_is_named(tmp_path: Path, tokens: bytes) -> None:
    prefix = _damaged(tmp_path, tokens=tokens)
    with pytest.raises(DataError, match=rf"d\.bin: byte {min(len(tokens), 12)}: "):
        IndexedStore(prefix)


@given(st.integers(0, len(GOLDEN_IDX) - 1), st.integers(0, 7))
@settings(max_examples=150)
def test_flipped_index_bits_never_crash_or_misread(
    tmp_path_factory: pytest.TempPathFactory, offset: int, bit: int
) -> None:
    """Refused by name, or (inside the document list, or a wider dtype) still a valid store."""
    idx = bytearray(GOLDEN_IDX)
    idx[offset] ^= 1 << bit
    prefix = _damaged(tmp_path_factory.mktemp("flip"), bytes(idx))
    try:
        store = IndexedStore(prefix)
    except DataError as error:
        assert "d.idx: byte" in str(error) or "d.bin: byte" in str(error)
    else:
        assert sum(store[i].size for i in range(len(store))) == store.tokens.size
        assert offset == 17 or offset >= 70


def test_missing_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.idx: cannot be read: No such file"):
        IndexedStore(tmp_path / "nothing")


@pytest.mark.parametrize("ids", [[-1], [[1, 2]], [1.5], [65536]])
def test_bad_tokens_are_refused(tmp_path: Path, ids: list) -> None:
    with (
        pytest.raises(DataError, match="document 1: "),
        IndexedWriter(tmp_path / "x", np.uint16) as writer,
    ):
        writer.add([1])
        writer.add(ids)
    assert names(tmp_path) == []


def test_dtype_follows_megatron() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32
    with pytest.raises(DataError, match="float"):
        IndexedWriter("x", np.float32)


@pytest.mark.parametrize("text", ["[1]", '{"text": "mine"}', '{"format": 2}', "no JSON"])
def test_what_is_no_manifest_is_kept(tmp_path: Path, text: str) -> None:
    with IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add([1])
    file = tmp_path / "s.store.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"s\.store\.json: not a store's manifest.*move it") as told:
        read_manifest(tmp_path / "s")
    assert "delete" not in str(told.value)
    with pytest.raises(DataError, match="move it"), IndexedWriter(tmp_path / "s", np.uint16):
        pass
    assert file.read_text() == text


def test_names_are_on_disk_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power loss may not keep the index and lose the tokens that it is of."""
    seen: list[str] = []
    replace = Path.replace

    def renamed(self: Path, target: Path) -> Path:
        seen.append(Path(target).suffix)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(indexed, "sync_folder", lambda folder: seen.append("sync"))
    with indexed.IndexedWriter(tmp_path / "s", np.dtype(np.uint16)) as writer:
        writer.add([1, 2])
    assert seen == ["sync", ".bin", "sync", ".idx", "sync"]
