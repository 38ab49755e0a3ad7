"""Readers of raw text: each yields named documents in a fixed order, or says where the input ends
being readable (file and byte offset, line or row).

One rule for all: text is UTF-8; a byte order mark at a file's beginning is no part of it; line ends
are kept as they are inside of texts; half of a surrogate pair is no text. Compressed files are read
by their suffix (`streams`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shardwise.data import streams
from shardwise.data.streams import MAX_EXPANSION
from shardwise.data.unused import Unused
from shardwise.errors import DataError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Document:
    """A piece of text and where it came from (a path, or path:line)."""

    name: str
    text: str

    @property
    def raw(self) -> bytes:
        """Its UTF-8 bytes: what compressors and bits per byte count."""
        return self.text.encode("utf-8")


def read_text(files: Sequence[Path], max_expansion: float = MAX_EXPANSION) -> Iterator[Document]:
    """Each UTF-8 file is one document. Empty files among others are skipped, with a warning."""
    found = False
    for file in files:
        text = streams.decode(streams.whole(file, max_expansion), file)
        if not text:
            log.warning("%s: empty file skipped", file)
            continue
        found = True
        yield Document(file.as_posix(), text)
    if not found:
        raise DataError(f"{files[0]}: byte 0: the input is empty")


def read_json_rows(
    files: Sequence[Path], max_expansion: float = MAX_EXPANSION
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file: line N, byte B``, object) of each line that is not blank, of `streams.MAX_ROW`."""
    for file in files:
        for number, start, row in _json_lines(file, max_expansion, streams.MAX_ROW):
            yield f"{file}: line {number}, byte {start}", row


def _json_lines(
    file: Path, max_expansion: float, max_bytes: int = 0
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number from 1, byte offset, object) of each line that is not blank."""
    offset, any_line = 0, False
    for number, line in enumerate(streams.lines(file, max_expansion, max_bytes), start=1):
        start, offset = offset, offset + len(line)
        if not line.strip():
            continue
        any_line = True
        text = streams.decode(line, file, start, number)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # the latter: nested too deeply
            column = error.pos if isinstance(error, json.JSONDecodeError) else 0
            at = start + len(text[:column].encode())
            raise DataError(f"{file}: line {number}, byte {at}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}: line {number}, byte {start}: not a JSON object")
        if b"\\u" in line:
            _refuse_surrogates(row, f"{file}: line {number}, byte {start}")
        yield number, start, row
    if not any_line:
        raise DataError(f"{file}: byte 0: the input is empty")


def _refuse_surrogates(row: dict[str, Any], where: str) -> None:
    """JSON can spell half of a surrogate pair, which has no UTF-8 and no tokens."""
    for field, value in row.items():
        waiting: list[Any] = [field, value]
        while waiting:
            match waiting.pop():
                case str() as text:
                    try:
                        text.encode("utf-8")
                    except UnicodeEncodeError as error:
                        raise DataError(
                            f"{where}: character {error.start}: a lone surrogate is no text (in "
                            f"field {field!r}); mend what cut the character in two"
                        ) from error
                case Mapping() as mapping:
                    waiting += [*mapping.keys(), *mapping.values()]
                case list() as items:
                    waiting += items


def read_jsonl(
    files: Sequence[Path],
    field: str = "text",
    max_expansion: float = MAX_EXPANSION,
    unused: Unused | None = None,
) -> Iterator[Document]:
    """Each line is an object whose ``field`` is one document; ``unused`` counts the others."""
    found = False
    for file in files:
        for number, start, row in _json_lines(file, max_expansion):
            text = row.get(field)
            where = f"{file}: line {number}, byte {start}"
            if not isinstance(text, str):
                have = ", ".join(sorted(row)) or "none"
                raise DataError(f"{where}: field {field!r} is not a string; fields: {have}")
            if unused is not None and len(row) > 1:
                unused.add(where, (name for name in row if name != field))
            if _any_text(text, where):
                found = True
                yield Document(f"{file.as_posix()}:{number}", text)
    if not found:
        raise DataError(f"{files[0]}: byte 0: every {field!r} is empty")


def _any_text(text: str, where: str) -> bool:
    if not text:
        log.warning("%s: empty document skipped", where)
    return bool(text)


def require_parquet() -> None:
    """Raise DataError when pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise DataError("parquet needs pyarrow: pip install 'shardwise[data]'")


def read_parquet(
    files: Sequence[Path], field: str = "text", unused: Unused | None = None
) -> Iterator[Document]:
    """Each row's string column ``field`` is one document; needs the extra ``data`` (pyarrow).

    Rows count from 0 through the whole file; ``unused`` counts the other columns.
    """
    require_parquet()
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    found = False
    for file in files:
        row = group = 0
        try:
            with ParquetFile(file) as table:
                columns = table.schema_arrow.names
                if field not in columns:
                    raise DataError(f"{file}: no column {field!r}; columns: {', '.join(columns)}")
                if unused is not None:
                    others = [name for name in columns if name != field]
                    unused.add(str(file), others, table.metadata.num_rows)
                for group in range(table.num_row_groups):
                    for batch in table.iter_batches(row_groups=[group], columns=[field]):
                        for text in batch.column(0).to_pylist():
                            where = f"{file}: row group {group}, row {row}"
                            row += 1
                            if not isinstance(text, str):
                                raise DataError(f"{where}: column {field!r} holds no string")
                            if _any_text(text, where):
                                found = True
                                yield Document(f"{file.as_posix()}:{row - 1}", text)
        except (ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            where = f"{file}: unreadable parquet at row group {group}, row {row}"
            raise DataError(f"{where} ({file.stat().st_size} bytes): {error}") from error
    if not found:
        raise DataError(f"{files[0]}: row 0: the input is empty")
