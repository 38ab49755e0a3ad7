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
"""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardwise.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
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

    Raises DataError for a file of that name that is no manifest of format 1.
    """
    path = manifest_path(prefix)
    if not (store_paths(prefix)[1].exists() and path.exists()):
        return None
    return _parse_manifest(path)


def _parse_manifest(path: Path) -> dict[str, Any]:
    mend = "it may be somebody's data: move it elsewhere, or name another store"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a store's manifest, nor JSON: {error}; {mend}") from error
    wanted = {"content_hash": str, "num_bytes": int}
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != 1
        or not all(isinstance(manifest.get(key), kind) for key, kind in wanted.items())
    ):
        raise DataError(f"{path}: not a store's manifest of format 1; {mend}")
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
        sizes = {p: _size(p) for p in (self.idx_path, self.bin_path)}
        lengths, pointers, documents = self._read_index(sizes[self.idx_path])
        itemsize = self.dtype.itemsize
        total = int(lengths.sum(dtype=np.int64)) * itemsize
        if sizes[self.bin_path] != total:
            at = min(sizes[self.bin_path], total)
            raise DataError(
                f"{self.bin_path}: byte {at}: {sizes[self.bin_path]} bytes, but the index counts "
                f"{total}; truncated, or of another index"
            )
        if not total:
            raise DataError(f"{self.bin_path}: byte 0: the store holds no tokens")
        self.tokens: NDArray[Any] = np.memmap(self.bin_path, dtype=self.dtype, mode="r")
        ends = np.append(pointers // itemsize, self.tokens.size)
        self.starts: NDArray[np.int64] = ends[documents]

    def _read_index(self, size: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        path = self.idx_path
        if size < _HEADER.size:
            raise DataError(f"{path}: byte {size}: truncated inside the header")
        raw = np.memmap(path, dtype=np.uint8, mode="r")
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
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
        self.num_tokens = 0  # added so far
        self.manifest: dict[str, Any] | None = (
            None  # set before leaving: JSON kept beside the store
        )
        mark = f".{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
        self._finals = (self.bin_path, manifest_path(prefix), self.idx_path)
        self._temporary = [p.with_name(f".{p.name}{mark}") for p in self._finals]
        self._stream: BinaryIO

    def __enter__(self) -> IndexedWriter:
        if (old := self._finals[1]).exists():
            _parse_manifest(old)  # what we did not write we do not replace
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
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
            self._stream.write(ids.astype(self.dtype.newbyteorder("<")).tobytes())
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
        manifest = "" if self.manifest is None else json.dumps(self.manifest, indent=2) + "\n"
        contents = (manifest.encode(), index_bytes(self._code, self._lengths, self._documents))
        for path, content in zip(self._temporary[1:], contents):
            with path.open("wb") as stream:
                stream.write(content)
                _sync(stream)
        # From here to the last line there is no index, hence no store: never a wrong pair.
        for path in self._finals[:0:-1]:
            path.unlink(missing_ok=True)
        for temporary, final in zip(self._temporary, self._finals):
            if temporary != self._temporary[1] or self.manifest is not None:
                temporary.replace(final)


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
