"""Files as streams of bytes, decompressed by their suffix, and bytes as text.

``.gz``, ``.bz2``, ``.xz`` and ``.zst`` files are read as what they hold, member after member. What
they may expand to is bounded: a small file of a hostile maker would otherwise fill the memory or
run for days. A stream that is cut off or damaged is an error, never an early end.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from shardwise.errors import DataError
from shardwise.safe_files import open_regular

MAX_EXPANSION = 200.0  # text of JSON lines reaches about 30; a bomb of gzip 1,000
_FREE = 1 << 26  # bytes that any file may expand to: small files of one letter are no bombs
_BLOCK = 1 << 18
_MAX_WINDOW = 1 << 27  # zstd: memory that a frame may ask for (``zstd --long=27``)
MAX_LINE = 1 << 28  # bytes of one line, a document
MAX_ROW = 1 << 23  # of one conversation: as tokens with their places it takes 300 times this
MAX_TEXT = 1 << 30  # of a file that is one document
BOM = b"\xef\xbb\xbf"


class _Format(NamedTuple):
    new: Callable[[], Any]  # a decompressor of one member: decompress(data, limit), eof, unused
    errors: tuple[type[Exception], ...]


class _Gzip:
    """zlib's decompressor in the shape of bz2's and lzma's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


def _gzip() -> _Format:
    return _Format(_Gzip, (zlib.error,))


def _bzip2() -> _Format:
    return _Format(bz2.BZ2Decompressor, (OSError, EOFError, ValueError))


def _xz() -> _Format:
    new = lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)  # noqa: E731
    return _Format(new, (lzma.LZMAError, EOFError))


_FORMATS: dict[str, Callable[[], _Format]] = {".gz": _gzip, ".bz2": _bzip2, ".xz": _xz}
SUFFIXES = (*_FORMATS, ".zst")


def suffix_of(path: Path) -> str:
    """The suffix of what a file holds, in lower case: ``.jsonl`` for ``a.jsonl.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in SUFFIXES else suffix


def require_zstd(path: Path) -> None:
    """Raise DataError when a ``.zst`` file cannot be read here."""
    if find_spec("zstandard") is None:
        raise DataError(f"{path}: zstd needs zstandard: pip install 'shardwise[data]'")


def blocks(path: Path, max_expansion: float = MAX_EXPANSION) -> Iterator[bytes]:
    """The content of a regular file in pieces of at most 256 KiB, decompressed by its suffix.

    Raises DataError, naming the file, for a damaged or truncated stream, and for one that expands
    to more than ``max_expansion`` times its size (64 MiB are free).
    """
    suffix = path.suffix.lower()
    try:
        with open_regular(path) as raw:
            if suffix not in SUFFIXES:
                while block := raw.read(_BLOCK):
                    yield block
                return
            parts = _zstd(raw, path) if suffix == ".zst" else _members(raw, path, suffix)
            limit = max(_FREE, int(path.stat().st_size * max_expansion))
            total = 0
            for block in parts:
                total += len(block)
                if total > limit:
                    raise DataError(
                        f"{path}: expands to more than {max_expansion:g} times its size, as a bomb "
                        "would; if it is meant, raise the source's max_expansion"
                    )
                yield block
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _members(raw: BinaryIO, path: Path, suffix: str) -> Iterator[bytes]:
    """Every member of a stream; zeros may follow the last, as trace drives leave them."""
    new, errors = _FORMATS[suffix]()
    data, reader, at = b"", None, 0

    def damaged(why: object) -> DataError:
        return DataError(f"{path}: byte {at}: the {suffix[1:]} stream is damaged: {why}")

    while True:
        if reader is None or reader.needs_input:
            fresh = raw.read(_BLOCK)
            at += len(fresh)
            data += fresh
            if not data:
                break
        if reader is None:
            if not (data := data.lstrip(b"\0")):
                continue
            reader = new()
        try:
            block = reader.decompress(data, _BLOCK)
        except errors as error:
            raise damaged(error) from error
        data = b""
        if block:
            yield block
        if reader.eof:
            data, reader = reader.unused_data, None
        elif not block and not fresh:
            break
    if reader is not None:
        raise damaged("it ends in the middle (truncated?)")


def _zstd(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """Every frame of a zstd file; needs the extra ``data``."""
    require_zstd(path)
    import zstandard

    reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    data, at = b"", 0
    frame: Any = None
    while True:
        fresh = raw.read(1 << 10)  # what this expands to is made at once: 32 MiB at most
        at += len(fresh)
        if not (data := data + fresh):
            break
        frame = frame or reader.decompressobj()
        try:
            block = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: byte {at}: the zst stream is damaged: {error}") from error
        data = b""
        for start in range(0, len(block), _BLOCK):
            yield block[start : start + _BLOCK]
        if frame.eof:
            data, frame = frame.unused_data, None
    if frame is not None:
        raise DataError(f"{path}: byte {at}: the zst stream ends in the middle (truncated?)")


def whole(path: Path, max_expansion: float = MAX_EXPANSION) -> bytes:
    """The content of a file that is one document; DataError for more than `MAX_TEXT` bytes."""
    parts: list[bytes] = []
    size = 0
    for block in blocks(path, max_expansion):
        parts.append(block)
        size += len(block)
        if size > MAX_TEXT:
            raise DataError(
                f"{path}: byte {MAX_TEXT}: one document of more than {MAX_TEXT >> 20} MiB; split "
                "the file, or write its documents as lines of a .jsonl file (kind jsonl)"
            )
    return b"".join(parts)


def lines(path: Path, max_expansion: float = MAX_EXPANSION, max_bytes: int = 0) -> Iterator[bytes]:
    """The lines of a file, ends included; DataError for one over ``max_bytes`` (0: `MAX_LINE`)."""
    limit = max_bytes or MAX_LINE
    parts: list[bytes] = []
    size, number = 0, 1
    for block in blocks(path, max_expansion):
        *ended, last = block.split(b"\n")
        for line in ended:
            if size + len(line) > limit:
                raise _too_long(path, number, limit)
            yield b"".join((*parts, line, b"\n"))
            parts, size, number = [], 0, number + 1
        parts.append(last)
        size += len(last)
        if size > limit:
            raise _too_long(path, number, limit)
    if size:
        yield b"".join(parts)


def _too_long(path: Path, number: int, limit: int) -> DataError:
    return DataError(
        f"{path}: line {number}: longer than {limit:,} bytes, as no row is; is it a file of "
        "lines? split what it holds over more of them"
    )


def decode(data: bytes, path: Path, base: int = 0, line: int | None = None) -> str:
    """UTF-8, without the byte order mark that may stand at a file's beginning.

    ``base``: where in the file ``data`` begins. Raises DataError with the first bad byte.
    """
    if base == 0 and data.startswith(BOM):
        data, base = data[len(BOM) :], len(BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "" if line is None else f"line {line}, "
        mend = (
            "; it looks like UTF-16: convert it" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        )
        raise DataError(
            f"{path}: {where}byte {base + error.start}: not UTF-8 ({error.reason}){mend}"
        ) from error
