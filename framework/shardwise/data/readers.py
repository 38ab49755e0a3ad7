"""Readers of raw text: each yields named documents in a fixed order, or says where the input ends
being readable (file and byte offset, line or row)."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shardwise.data.conversation import check_messages
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


def read_text(files: Sequence[Path]) -> Iterator[Document]:
    """Each UTF-8 file is one document. Empty files among others are skipped, with a warning."""
    found = False
    for file in files:
        data = file.read_bytes()
        if not data:
            log.warning("%s: empty file skipped", file)
            continue
        found = True
        yield Document(file.as_posix(), _decode(data, file))
    if not found:
        raise DataError(f"{files[0]}: byte 0: the input is empty")


def _decode(data: bytes, file: Path, base: int = 0, line: int | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "" if line is None else f"line {line}, "
        message = f"{file}: {where}byte {base + error.start}: not UTF-8 ({error.reason})"
        raise DataError(message) from error


def _json_lines(file: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number from 1, byte offset, object) of each line that is not blank."""
    offset, any_line = 0, False
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            any_line = True
            text = _decode(line, file, start, number)
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # the latter: nested too deeply
                column = error.pos if isinstance(error, json.JSONDecodeError) else 0
                at = start + len(text[:column].encode())
                raise DataError(f"{file}: line {number}, byte {at}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{file}: line {number}, byte {start}: not a JSON object")
            yield number, start, row
    if not any_line:
        raise DataError(f"{file}: byte 0: the input is empty")


def read_jsonl(files: Sequence[Path], field: str = "text") -> Iterator[Document]:
    """Each line is an object whose ``field`` is one document."""
    found = False
    for file in files:
        for number, start, row in _json_lines(file):
            text = row.get(field)
            where = f"{file}: line {number}, byte {start}"
            if not isinstance(text, str):
                have = ", ".join(sorted(row)) or "none"
                raise DataError(f"{where}: field {field!r} is not a string; fields: {have}")
            if _is_text(text, where):
                found = True
                yield Document(f"{file.as_posix()}:{number}", text)
    if not found:
        raise DataError(f"{files[0]}: byte 0: every {field!r} is empty")


def _is_text(text: str, where: str) -> bool:
    """False (with a warning) for an empty string; DataError for half a surrogate pair."""
    if not text:
        log.warning("%s: empty document skipped", where)
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start}: a lone surrogate is no text") from error
    return True


def require_parquet() -> None:
    """Raise DataError when pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise DataError("parquet needs pyarrow: pip install 'shardwise[data]'")


def read_parquet(files: Sequence[Path], field: str = "text") -> Iterator[Document]:
    """Each row's string column ``field`` is one document; needs the extra ``data`` (pyarrow)."""
    require_parquet()
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    found = False
    for file in files:
        row = 0
        try:
            with ParquetFile(file) as table:
                if field not in table.schema_arrow.names:
                    have = ", ".join(table.schema_arrow.names)
                    raise DataError(f"{file}: no column {field!r}; columns: {have}")
                for batch in table.iter_batches(columns=[field]):
                    for text in batch.column(0).to_pylist():
                        where = f"{file}: row {row}"
                        row += 1
                        if not isinstance(text, str):
                            raise DataError(f"{where}: column {field!r} holds no string")
                        if _is_text(text, where):
                            found = True
                            yield Document(f"{file.as_posix()}:{row - 1}", text)
        except (ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            size = file.stat().st_size
            message = f"{file}: unreadable parquet at row {row} ({size} bytes): {error}"
            raise DataError(message) from error
    if not found:
        raise DataError(f"{files[0]}: row 0: the input is empty")


def read_json_rows(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object, with where it stands."""
    for file in files:
        for number, start, row in _json_lines(file):
            yield f"{file}: line {number}, byte {start}", row


def read_chat_jsonl(
    files: Sequence[Path], field: str = "messages"
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Each line holds a conversation: (where, list of {role, content}) with string contents."""
    for file in files:
        for number, start, row in _json_lines(file):
            where = f"{file}: line {number}, byte {start}"
            try:
                yield where, check_messages(row.get(field))
            except DataError as error:
                raise DataError(f"{where}: field {field!r}: {error}") from error
