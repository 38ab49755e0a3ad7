"""The token store: memory-mapped, in the format that Megatron-LM reads and writes.

``<prefix>.bin`` is nothing but token ids. ``<prefix>.idx``, little-endian:

====== ========================= =====================================================
offset content                   meaning
====== ========================= =====================================================
0      ``MMIDIDX\\0\\0``           magic
9      uint64 1                  version
17     uint8                     dtype code (`_DTYPES`)
18     uint64 S                  number of sequences
26     uint64 D                  number of document indices, one more than documents
34     int32[S]                  tokens of each sequence
..     int64[S]                  byte offset of each sequence in ``.bin``
..     int64[D]                  first sequence of each document, and S at the end
..     int8[S], optional         modes of multimodal data; ignored here
====== ========================= =====================================================

The writer works under temporary names and commits by renaming, the index last: a store without an
index does not exist. Format: megatron/core/datasets/indexed_dataset.py.

``<prefix>.store.json``, of the stores that we write, holds the size and hash of both files, and its
own; they are compared when the store is opened (see `shardwise.integrity`).
"""

from __future__ import annotations

import json
import logging
import os
import struct
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from shardwise import integrity, safe_files
from shardwise.errors import DataError
from shardwise.storage.durable import make_folder, sync_folder

log = logging.getLogger(__name__)

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_MEND = "restore the store, or prepare it again; --no-verify takes it as it is"
_DTYPES: dict[int, Any] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32,
    5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip


def store_paths(prefix: Path | str) -> tuple[Path, Path]:
    """(.bin, .idx) of a store, given its prefix or either file."""
    text = os.fspath(prefix)
    if text.endswith((".bin", ".idx")):
        text = text[:-4]
    return Path(text + ".bin"), Path(text + ".idx")


def manifest_path(prefix: Path | str) -> Path:
    """Where a store that we wrote keeps its counts and hashes."""
    # Not ``<prefix>.json``, which may well be the user's corpus.
    return store_paths(prefix)[0].with_suffix(".store.json")


def read_manifest(prefix: Path | str) -> dict[str, Any] | None:
    """The manifest of a committed store; None when there is no store, or it has no manifest.

    Raises DataError for a file of that name that is no manifest, or is damaged.
    """
    path = manifest_path(prefix)
    if not (store_paths(prefix)[1].exists() and path.exists()):
        return None
    manifest = _own_manifest(path)
    found = manifest.get("files")
    if manifest["format"] == 1 and found is None and "digest" not in manifest:
        return manifest  # from before contents were hashed
    mend = "restore the store, or prepare it again"
    if not integrity.is_sealed(manifest):
        raise DataError(f"{path}: does not match its own hash; {mend}")
    names = [p.suffix for p in store_paths(prefix)]
    if not isinstance(found, dict) or not all(integrity.is_entry(found.get(n)) for n in names):
        raise DataError(f"{path}: holds no hash of the store's files; {mend}")
    return manifest


def _own_manifest(path: Path) -> dict[str, Any]:
    """What a file holds that is, perhaps damaged, a manifest of ours. Raises DataError."""
    mend = "it may be somebody's data: move it elsewhere, or name another store"
    try:
        manifest = json.loads(safe_files.read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a store's manifest, nor JSON: {error}; {mend}") from error
    wanted = {"content_hash": str, "num_bytes": int}
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") not in (1, 2)
        or not all(isinstance(manifest.get(key), kind) for key, kind in wanted.items())
    ):
        raise DataError(f"{path}: not a store's manifest; {mend}")
    return manifest


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest dtype that Megatron, too, chooses for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedStore:
    """A store open for reading; documents are views into the memory map.

    ``tokens``: flat array of all tokens. ``starts``: int64 [num_documents + 1], the first token of
    each document. Raises DataError, naming file and byte offset, unless magic, version, sizes and
    offsets are all as they should be.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.bin_path, self.idx_path = store_paths(prefix)
        # What is hashed is what is mapped: the same open files.
        with _open(self.idx_path) as idx, _open(self.bin_path) as tokens:
            sizes = {p: os.fstat(f.fileno()).st_size for p, f in self._paths(idx, tokens)}
            self._check_content(idx, tokens)
            lengths, pointers, documents = self._read_index(idx, sizes[self.idx_path])
            itemsize = self.dtype.itemsize
            total = int(lengths.sum(dtype=np.int64)) * itemsize
            if sizes[self.bin_path] != total:
                at = min(sizes[self.bin_path], total)
                raise DataError(
                    f"{self.bin_path}: byte {at}: {sizes[self.bin_path]} bytes, but the index "
                    f"counts {total}; truncated, or of another index"
                )
            if not total:
                raise DataError(f"{self.bin_path}: byte 0: the store holds no tokens")
            self.tokens: NDArray[Any] = np.memmap(tokens, dtype=self.dtype, mode="r")
        ends = np.append(pointers // itemsize, self.tokens.size)
        self.starts: NDArray[np.int64] = ends[documents]

    def _paths(self, idx: BinaryIO, tokens: BinaryIO) -> list[tuple[Path, BinaryIO]]:
        return [(self.idx_path, idx), (self.bin_path, tokens)]

    def _check_content(self, idx: BinaryIO, tokens: BinaryIO) -> None:
        """Compare both files with the manifest, if the store has one."""
        manifest = read_manifest(self.bin_path)
        if manifest is None:
            return
        if manifest["format"] == 1:
            log.warning(
                "%s was written before token stores were hashed, so damage to it would not be "
                "noticed; prepare it again",
                self.bin_path,
            )
            return
        for path, stream in self._paths(idx, tokens):
            integrity.check(stream, path, manifest["files"][path.suffix], _MEND)

    def _read_index(
        self, stream: BinaryIO, size: int
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        path = self.idx_path
        if size < _HEADER.size:
            raise DataError(f"{path}: byte {size}: truncated inside the header")
        raw = np.memmap(stream, dtype=np.uint8, mode="r")
        magic, version, code, num_seqs, num_docs = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        if magic != _MAGIC:
            raise DataError(f"{path}: byte 0: not a token index (magic {magic!r})")
        if version != 1:
            raise DataError(f"{path}: byte 9: version {version}; this program reads version 1")
        if code not in _DTYPES or np.dtype(_DTYPES[code]).kind == "f":
            raise DataError(f"{path}: byte 17: dtype code {code} is no integer type")
        self.dtype: np.dtype[Any] = np.dtype(_DTYPES[code]).newbyteorder("<")
        at_pointers = _HEADER.size + 4 * num_seqs
        at_documents = at_pointers + 8 * num_seqs
        end = at_documents + 8 * num_docs
        if size not in (end, end + num_seqs):
            raise DataError(
                f"{path}: byte {min(size, end)}: {size} bytes, but its header counts {end}; "
                "truncated or corrupt"
            )
        lengths = raw[_HEADER.size : at_pointers].view("<i4")
        pointers = raw[at_pointers:at_documents].view("<i8")
        documents = raw[at_documents:end].view("<i8")
        _first_bad(path, _HEADER.size, lengths < 0, 4, "a negative length")
        expected = np.zeros(num_seqs, dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=expected[1:])
        expected *= self.dtype.itemsize
        _first_bad(path, at_pointers, pointers != expected, 8, "an offset that does not follow")
        # A valid list is 0 .. num_seqs, never falling; compared with itself it needs no history.
        falls = np.diff(documents, prepend=0, append=num_seqs) < 0
        _first_bad(path, at_documents, falls, 8, "a document index out of order")
        if num_docs == 0 or documents[0] != 0 or documents[-1] != num_seqs:
            raise DataError(f"{path}: byte {at_documents}: documents do not span 0 to {num_seqs}")
        return lengths, pointers, documents

    def __len__(self) -> int:
        """Number of documents."""
        return self.starts.size - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Tokens of one document."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [num_documents]: tokens of each document."""
        return np.diff(self.starts)


def _open(path: Path) -> BinaryIO:
    try:
        return safe_files.open_regular(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _first_bad(path: Path, base: int, bad: NDArray[np.bool_], width: int, what: str) -> None:
    if bad.any():
        raise DataError(f"{path}: byte {base + width * int(bad.argmax())}: {what}")


class IndexedWriter:
    """Writes a store, document by document; a context manager.

    Leaving it normally commits; leaving it by an exception, or without any token, removes every
    temporary file and keeps what was there before. ``dtype``: see `token_dtype`.
    """

    def __init__(self, prefix: Path | str, dtype: Any) -> None:
        self.bin_path, self.idx_path = store_paths(prefix)
        self.dtype = np.dtype(dtype)
        codes = {np.dtype(t): c for c, t in _DTYPES.items() if np.dtype(t).kind in "iu"}
        if self.dtype not in codes:
            raise DataError(f"{self.bin_path}: tokens cannot be stored as {self.dtype}")
        self._code = codes[self.dtype]
        self._largest = int(np.iinfo(self.dtype).max)
        self._lengths: list[int] = []
        self._documents = [0]
        self._hash = xxhash.xxh3_128()
        self.num_tokens = 0  # added so far
        self.manifest: dict[str, Any] | None = (
            None  # set before leaving: JSON kept beside the store, with the files' hashes
        )
        mark = f".{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
        self._finals = (self.bin_path, manifest_path(prefix), self.idx_path)
        self._temporary = [p.with_name(f".{p.name}{mark}") for p in self._finals]
        self._stream: BinaryIO

    def __enter__(self) -> IndexedWriter:
        if (old := self._finals[1]).exists():
            _own_manifest(old)  # what we did not write we do not replace
        make_folder(self.bin_path.parent)
        self._stream = self._temporary[0].open("wb")
        return self

    def add(self, tokens: ArrayLike) -> None:
        """Append one document of one sequence; ids as a list or an integer array."""
        self.add_document([tokens])

    def add_document(self, sequences: Iterable[ArrayLike]) -> None:
        """Append one document of several sequences (as Megatron's sentence splitting makes)."""
        for tokens in sequences:
            ids = np.asarray(tokens)
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise DataError(
                    f"{self.bin_path}: document {self.num_documents}: not a list of ids"
                )
            if ids.size and (int(ids.min()) < 0 or int(ids.max()) > self._largest):
                raise DataError(
                    f"{self.bin_path}: document {self.num_documents}: ids {ids.min()} to "
                    f"{ids.max()} do not fit {self.dtype}"
                )
            data = ids.astype(self.dtype.newbyteorder("<")).tobytes()
            self._stream.write(data)
            self._hash.update(data)
            self._lengths.append(int(ids.size))
            self.num_tokens += int(ids.size)
        self._documents.append(len(self._lengths))

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._documents) - 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._stream.close()
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def _commit(self) -> None:
        if not self.num_tokens:
            raise DataError(f"{self.bin_path}: there are no tokens to store; the input is empty")
        _sync(self._stream)
        self._stream.close()
        index = index_bytes(self._code, self._lengths, self._documents)
        manifest = ""
        if self.manifest is not None:
            size = self.num_tokens * self.dtype.itemsize
            tokens = {"size": size, "xxh3_128": self._hash.hexdigest()}
            hashed = {".bin": tokens, ".idx": integrity.entry(index)}
            sealed = integrity.sealed({**self.manifest, "format": 2, "files": hashed})
            manifest = json.dumps(sealed, indent=2) + "\n"
        contents = (manifest.encode(), index)
        for path, content in zip(self._temporary[1:], contents):
            with path.open("wb") as stream:
                stream.write(content)
                _sync(stream)
        # From here to the last line there is no index, hence no store: never a wrong pair, not even
        # after a power loss, which may keep a later name and lose an earlier one.
        for path in self._finals[:0:-1]:
            path.unlink(missing_ok=True)
        for temporary, final in zip(self._temporary, self._finals):
            if temporary != self._temporary[1] or self.manifest is not None:
                sync_folder(final.parent)
                temporary.replace(final)
        sync_folder(self.bin_path.parent)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def index_bytes(code: int, lengths: Sequence[int], documents: Sequence[int]) -> bytes:
    """The content of an ``.idx`` file: dtype ``code``, sequence lengths, document indices."""
    sizes = np.asarray(lengths, dtype="<i8")
    if sizes.size and int(sizes.max()) > np.iinfo(np.int32).max:
        raise DataError(f"a document has {sizes.max()} tokens; the format holds at most 2**31 - 1")
    offsets = (np.cumsum(sizes) - sizes) * np.dtype(_DTYPES[code]).itemsize
    return b"".join(
        (
            _HEADER.pack(_MAGIC, 1, code, len(lengths), len(documents)),
            sizes.astype("<i4").tobytes(),
            offsets.astype("<i8").tobytes(),
            np.asarray(documents, dtype="<i8").tobytes(),
        )
    )
