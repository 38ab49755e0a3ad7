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
from pathlib import Path
from typing import Any

from shardwise.data import streams, tables
from shardwise.data.left_out import EMPTY, leave_out
from shardwise.data.streams import MAX_EXPANSION
from shardwise.data.tables import ARROW, PARQUET
from shardwise.data.unused import Unused
from shardwise.errors import DataError

log = logging.getLogger(__name__)
TABLES = (PARQUET, ARROW)
ROW_SUFFIXES = (".jsonl", ".json", *TABLES)  # of files that hold rows


@dataclasses.dataclass(frozen=True)
class Document:
    """A piece of text and where it came from (a path, or path:line).

    ``special``: control tokens in it are such, as a template wrote them; else they are text.
    """

    name: str
    text: str
    special: bool = False

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
            leave_out(EMPTY, str(file))
            continue
        found = True
        yield Document(file.as_posix(), text)
    if not found:
        raise DataError(f"{files[0]}: byte 0: the input is empty")


def read_rows(
    files: Sequence[Path], max_expansion: float = MAX_EXPANSION, suffix: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each row, of at most `streams.MAX_ROW`.

    Rows are those of a table, the objects of a ``.json`` file's array, or else JSON lines.
    ``suffix``: of what the files hold, whatever their names say.
    """
    for file in files:
        kind = suffix or streams.suffix_of(file)
        for _, where, row in _numbered(file, kind, max_expansion, streams.MAX_ROW):
            if kind != ".jsonl":
                tables.check_size(where, row)
            yield where, row


def count_rows(file: Path, max_expansion: float = MAX_EXPANSION) -> int:
    """How many rows a file has; an array is read whole for it, lines are counted."""
    suffix = streams.suffix_of(file)
    if suffix in TABLES:
        return tables.columns_of(file, suffix)[1]
    if _is_array(file, suffix, max_expansion):
        return sum(1 for _ in _json_array(file, max_expansion))
    return sum(1 for line in streams.lines(file, max_expansion) if line.strip())


def _numbered(
    file: Path,
    suffix: str,
    max_expansion: float,
    max_bytes: int = 0,
    only: Sequence[str] | None = None,
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, where, row) of every row of a file."""
    if suffix in TABLES:
        yield from tables.read_rows(file, suffix, only)
    elif _is_array(file, suffix, max_expansion):
        yield from _json_array(file, max_expansion)
    else:
        for number, start, row in _json_lines(file, max_expansion, max_bytes):
            yield number, f"{file}: line {number}, byte {start}", row


def _is_array(file: Path, suffix: str, max_expansion: float) -> bool:
    """Whether a ``.json`` file is one array; others hold lines, whatever their name."""
    if suffix != ".json":
        return False
    begun = b""
    for block in streams.blocks(file, max_expansion):
        begun = (begun + block).removeprefix(streams.BOM).lstrip()
        if begun:
            break
    return begun.startswith(b"[")


def _json_array(file: Path, max_expansion: float) -> Iterator[tuple[int, str, dict[str, Any]]]:
    text = streams.decode(streams.whole(file, max_expansion), file)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: nested too deeply
        at = error.pos if isinstance(error, json.JSONDecodeError) else 0
        byte = len(text[:at].encode())
        raise DataError(f"{file}: byte {byte}: not JSON: {error}") from error
    surrogates = "\\u" in text
    for number, row in enumerate(found):
        where = f"{file}: row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object")
        if surrogates:
            _refuse_surrogates(row, where)
        yield number, where, row
    if not found:
        raise DataError(f"{file}: row 0: the input is empty")


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


def read_documents(
    files: Sequence[Path],
    field: str = "text",
    max_expansion: float = MAX_EXPANSION,
    unused: Unused | None = None,
    suffix: str = "",
) -> Iterator[Document]:
    """Each row's text ``field`` is one document; ``unused`` counts the other fields.

    ``suffix``: see `read_rows`.
    """
    found = False
    for file in files:
        kind = suffix or streams.suffix_of(file)
        table = kind in TABLES
        if table and unused is not None:
            columns, num_rows = tables.columns_of(file, kind)
            unused.add(str(file), (name for name in columns if name != field), num_rows)
        only = [field] if table else None
        for number, where, row in _numbered(file, kind, max_expansion, only=only):
            text = row.get(field)
            if not isinstance(text, str) and table:
                raise DataError(f"{where}: column {field!r} holds no string")
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
        leave_out(EMPTY, where)
    return bool(text)
