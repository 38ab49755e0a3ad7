"""Rows of parquet and Arrow files, through pyarrow (the extra ``data``).

An Arrow file is what ``datasets`` keeps: a stream of record batches, or the file format of the same
name. Rows count from 0 through a whole file. A table has a value in every column of every row, so
what JSON leaves out is null there, inside of nested objects too: nulls are left out again, and the
same rows mean the same in either container.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from shardwise.data import streams
from shardwise.errors import DataError
from shardwise.safe_files import open_regular

PARQUET, ARROW = ".parquet", ".arrow"
_FILE_MAGIC = b"ARROW1\0\0"  # of the file format; a stream has none


class Table(NamedTuple):
    """An open table: its columns in order, and (its part, rows) of what it holds."""

    columns: list[str]
    batches: Callable[[Sequence[str] | None], Iterator[tuple[str, Any]]]


def require(file: Path) -> None:
    """Raise DataError when pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise DataError(f"{file}: needs pyarrow: pip install 'shardwise[data]'")


def read_rows(
    file: Path, suffix: str, only: Sequence[str] | None = None
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, where, row) of each row; ``only`` these columns, which must be there.

    Raises DataError, with the file and the row, for what cannot be read.
    """
    require(file)
    row, place = 0, "row 0"
    try:
        with open_regular(file) as stream:
            table = _parquet(stream) if suffix == PARQUET else _arrow(stream)
            _check_columns(file, table.columns, only)
            for part, batch in table.batches(only):
                place = f"{part}row {row}"
                batch.validate(full=True)
                for values in batch.to_pylist():
                    place = f"{part}row {row}"
                    yield row, f"{file}: {place}", _without_nulls(values)
                    row += 1
    except _errors() as error:
        if isinstance(error, DataError):
            raise
        raise _unreadable(file, suffix, place, error) from error


def columns_of(file: Path, suffix: str) -> tuple[list[str], int]:
    """The names of a table's columns, and the number of its rows."""
    require(file)
    try:
        with open_regular(file) as stream:
            if suffix == PARQUET:
                from pyarrow.parquet import ParquetFile

                with ParquetFile(stream) as table:
                    return table.schema_arrow.names, table.metadata.num_rows
            found = _arrow(stream)
            return found.columns, sum(batch.num_rows for _, batch in found.batches(None))
    except _errors() as error:
        if isinstance(error, DataError):
            raise
        raise _unreadable(file, suffix, "row 0", error) from error


def _parquet(stream: Any) -> Table:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(stream)

    def batches(only: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
        columns = None if only is None else list(only)
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(row_groups=[group], columns=columns):
                yield f"row group {group}, ", batch

    return Table(table.schema_arrow.names, batches)


def _arrow(stream: Any) -> Table:
    from pyarrow import ipc

    is_file = stream.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    stream.seek(0)
    reader = ipc.open_file(stream) if is_file else ipc.open_stream(stream)

    def batches(only: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
        found = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in found:
            yield "", batch if only is None else batch.select(list(only))

    return Table(reader.schema.names, batches)


def _check_columns(file: Path, columns: list[str], only: Sequence[str] | None) -> None:
    if len(set(columns)) < len(columns):
        raise DataError(f"{file}: two columns of one name: {', '.join(columns)}")
    for name in only or ():
        if name not in columns:
            raise DataError(f"{file}: no column {name!r}; columns: {', '.join(columns)}")


def _without_nulls(value: Any) -> Any:
    """Plain data without keys that hold null."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def _errors() -> tuple[type[Exception], ...]:
    from pyarrow import ArrowException

    return ArrowException, OSError, ValueError, OverflowError


def _unreadable(file: Path, suffix: str, place: str, error: Exception) -> DataError:
    kind = suffix.removeprefix(".")
    size = file.stat().st_size if file.exists() else 0
    return DataError(f"{file}: unreadable {kind} at {place} ({size} bytes): {error}")


def text_size(value: Any) -> int:
    """Characters of all texts in plain data: what bounds a row that is no line."""
    total, waiting = 0, [value]
    while waiting:
        match waiting.pop():
            case str() as text:
                total += len(text)
            case dict() as mapping:
                waiting += [*mapping.keys(), *mapping.values()]
            case list() as items:
                waiting += items
    return total


def check_size(where: str, row: dict[str, Any]) -> None:
    """Raise DataError for a row of more than `streams.MAX_ROW`."""
    if text_size(row) > streams.MAX_ROW:
        raise DataError(f"{where}: longer than {streams.MAX_ROW:,} bytes, as no row is; split it")
