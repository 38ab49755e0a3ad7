"""metrics.jsonl: one JSON object a line, appended whole, rewound exactly on resume."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwise import safe_files
from shardwise.errors import DataError
from shardwise.storage.durable import (
    explain,
    make_folder,
    named,
    set_aside,
    sync_folder,
    write_durably,
)

log = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """A value as JSON knows it: numbers of numpy and torch become Python's, paths text."""
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        numel = value.numel() if hasattr(value, "numel") else value.size
        if numel == 1:
            value = value.item()
        else:
            return [plain(v) for v in value.tolist()]
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    return str(value)


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` without NaN and infinities, which JSON has no word for.

    Each becomes null beside ``<name>_nonfinite``, which says "nan", "inf" or "-inf".
    """
    out: dict[str, Any] = {}
    for key, raw in record.items():
        value = plain(raw)
        if isinstance(value, float) and not math.isfinite(value):
            out[key], out[f"{key}_nonfinite"] = None, str(value)
        else:
            out[key] = _no_nonfinite(value)
    return out


def _no_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return finite(value)
    if isinstance(value, list):
        return [_no_nonfinite(v) for v in value]
    return value


class JsonLines:
    """An append-only file of JSON objects.

    A line is handed to the kernel in one write on a descriptor opened for appending, so a
    killed process leaves at most one torn line, at the end; it is cut off on opening. A file that
    is damaged otherwise is kept aside, and its sound lines go on; ``damaged`` says so.

    What the storage does not take is kept in memory and tried again with the next line: a full
    disk costs no training. `sync` insists. Raises StorageError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = ""
        self._pending = b""
        with named(path):
            make_folder(path.parent)
            self._lines()
            self._fd = self._open()
            sync_folder(path.parent)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; NaN and infinities become null and a flag (see `finite`)."""
        told = bool(self._pending)
        self._pending += line_of(record)
        try:
            self._flush()
        except OSError as error:
            if not told:
                log.warning("%s; its lines wait in memory", explain(error, self.path))

    def _flush(self) -> None:
        while self._pending:  # a full disk may take a part of it; the next open cuts a torn line
            self._pending = self._pending[os.write(self._fd, self._pending) :]

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Keep the lines that ``wanted`` says yes to, bytes unchanged; returns how many went.

        The file is replaced atomically, and only when a line goes.
        """
        with named(self.path):
            self._flush()
            kept, dropped = self._lines(wanted)
            if dropped:
                write_durably(self.path, b"".join(kept))
            os.close(self._fd)
            self._fd = self._open()
        return dropped

    def sync(self) -> None:
        """Force what was appended to the disk; to be called before a checkpoint commits."""
        with named(self.path):
            self._flush()
            os.fsync(self._fd)

    def close(self) -> None:
        """Sync and close; appending afterwards fails."""
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1

    def _lines(
        self, wanted: Callable[[dict[str, Any]], bool] = lambda record: True
    ) -> tuple[list[bytes], int]:
        """The sound lines that are wanted, and how many are not; damage is moved aside first."""
        if not os.path.lexists(self.path):
            return [], 0
        if not self.path.is_file():
            self._aside("not a file")
            return [], 0
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        sound: list[bytes] = []
        kept: list[bytes] = []
        bad: list[int] = []
        for number, line in enumerate(whole.splitlines(keepends=True), 1):
            try:
                record = _parse(line, self.path)
            except DataError:
                bad.append(number)
                continue
            sound.append(line)
            if wanted(record):
                kept.append(line)
        if bad:
            self._aside(f"{len(bad)} of its lines are no JSON objects, the first is line {bad[0]}")
            write_durably(self.path, b"".join(sound))
        elif len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return kept, len(sound) - len(kept)

    def _aside(self, why: str) -> None:
        kept = set_aside(self.path, why)
        self.damaged = f"{self.path}: {why}; kept as {kept.name}, the run goes on without them"


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as a line of the file."""
    text = json.dumps(finite(record), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", errors="replace") + b"\n"


def _parse(line: bytes | str, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line.decode() if isinstance(line, bytes) else line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: a line is not JSON: {line[:80]!r} ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}: a line is not a JSON object: {line[:80]!r}")
    return record


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, in order; a torn last line is left out.

    Raises DataError, with the line's number, when a whole line is not a JSON object.
    """
    if not path.exists():
        return
    with safe_files.open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            if line.strip():
                try:
                    yield _parse(line, path)
                except DataError as error:
                    raise DataError(f"line {number}: {error}") from error


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append ``records`` to ``path``, as `JsonLines` does."""
    file = JsonLines(path)
    for record in records:
        file.append(record)
    file.close()
