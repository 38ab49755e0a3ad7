"""The log of what was asked, answered and rated: JSON lines, append-only, durable, redacted.

A log is ``FILE`` and the files that it was rotated into, ``FILE.000001`` and so on, oldest first.
Each begins with a line that says what it is. A record is on disk before its answer is told to have
been kept. A crash can leave half a line at the end of ``FILE``: it is of a record that nobody was
promised, and is cut off when the log is opened again.

kind       fields
---------  -----------------------------------------------------------------------------------------
log        version
answer     id, time, client, model, prompt (messages, or a text), sampling, seed, choices: of each
           text, token_ids, logprobs, weights ([first token, checksum] pairs), finish_reason.
           ``token_ids`` and ``logprobs`` are null where the text was redacted: they would tell it.
           ``client`` is a hash keyed by what ``FILE.key`` holds
feedback   id, choice, time, client, and rating (1, -1) or correction (a text)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shardwise import safe_files
from shardwise.errors import DataError, UserError
from shardwise.serve.privacy import private
from shardwise.storage.durable import named, sync_folder

MAGIC, VERSION = "shardwise-log", 1
MAX_LINE = 16 << 20  # bytes
_HEAD = (json.dumps({"kind": MAGIC, "version": VERSION}) + "\n").encode()
_FEEDBACK_KEYS = {"kind", "id", "choice", "time", "client", "rating", "correction"}
_ANSWER_KEYS = {
    "kind", "id", "time", "client", "model", "prompt", "sampling", "seed", "choices",
}  # fmt: skip


def parts(file: Path) -> list[Path]:
    """The files of a log, oldest first."""
    pattern = re.compile(re.escape(file.name) + r"\.\d{6}")
    rotated = (p for p in file.parent.glob(f"{_escaped(file.name)}.*") if pattern.fullmatch(p.name))
    return [*sorted(rotated), *([file] if file.exists() else [])]


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


class LogWriter:
    """Appends to a log that no other process writes. Safe to use from several threads.

    ``rotate_bytes``: a file that is larger is set aside before the next record. Raises UserError
    when another process has it or it is no log, StorageError when it cannot be written.
    """

    def __init__(self, file: Path, rotate_bytes: int = 64 << 20) -> None:
        self.file, self._rotate_bytes = file.absolute(), rotate_bytes
        self._lock = threading.Lock()
        with named(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._guard = os.open(f"{self.file}.key", flags, 0o600)
            try:
                self._key = self._hold()
                self._handle = self._open()
            except BaseException:
                os.close(self._guard)
                raise

    def _hold(self) -> bytes:
        """Keep other servers off; the key of the clients' hashes."""
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.file}: another server writes this log; give this one a file of its own"
            ) from None
        if len(key := os.pread(self._guard, 64, 0)) < 32:
            key = secrets.token_hex(16).encode()
            os.pwrite(self._guard, key, 0)
            os.fsync(self._guard)
        return key

    def client(self, identity: str) -> str:
        """What a client is called in this log."""
        return hmac.new(self._key, identity.encode(), hashlib.sha256).hexdigest()[:16]

    def answer(self, record: dict[str, Any]) -> None:
        """Append an answer, redacted; on return it is on disk."""
        prompt = record["prompt"]
        if isinstance(prompt, str):
            prompt = private(prompt)
        else:
            prompt = [{**m, "content": private(m["content"])} for m in prompt]
        choices = []
        for choice in record["choices"]:
            clean = private(choice["text"])
            kept = {"token_ids": None, "logprobs": None} if clean != choice["text"] else {}
            choices.append({**choice, "text": clean, **kept})
        self._append({"kind": "answer", **record, "prompt": prompt, "choices": choices})

    def feedback(self, record: dict[str, Any]) -> None:
        """Append a rating or a correction, redacted; on return it is on disk."""
        said = record.get("correction")
        clean = record if said is None else {**record, "correction": private(said)}
        self._append({"kind": "feedback", **clean})

    def close(self) -> None:
        """Others may write it from now on."""
        with self._lock:
            os.close(self._handle)
            os.close(self._guard)

    def _append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._lock, named(self.file):
            if os.fstat(self._handle).st_size > self._rotate_bytes:
                self._rotate()
            start = os.fstat(self._handle).st_size
            try:
                _write_all(self._handle, line)
                os.fsync(self._handle)
            except OSError:  # half a line must not stand before the next one
                os.ftruncate(self._handle, start)
                raise

    def _rotate(self) -> None:
        number = len(parts(self.file))
        while (aside := self.file.with_name(f"{self.file.name}.{number:06d}")).exists():
            number += 1
        self.file.rename(aside)
        os.close(self._handle)
        self._handle = self._open()

    def _open(self) -> int:
        """``FILE``, with its first line and without half a last one."""
        handle = os.open(
            self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            first, newline, _ = os.pread(handle, len(_HEAD), 0).partition(b"\n")
            if newline or not _HEAD.startswith(first):  # not the beginning of one of ours
                _check_head(first, self.file)
            size = _whole_size(handle)
            os.ftruncate(handle, size)
            if size == 0:
                _write_all(handle, _HEAD)
            os.fsync(handle)
            sync_folder(self.file.parent)
        except BaseException:
            os.close(handle)
            raise
        return handle


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _whole_size(handle: int) -> int:
    """Bytes up to the end of the last whole line."""
    end = os.fstat(handle).st_size
    while end > 0:
        start = max(0, end - 65536)
        if (at := os.pread(handle, end - start, start).rfind(b"\n")) >= 0:
            return start + at + 1
        end = start
    return 0


def _check_head(line: bytes, file: Path) -> None:
    """Raise DataError unless a line is the first one of a log."""
    try:
        head = safe_files.parse_json(line)
    except ValueError:
        head = None
    if not isinstance(head, dict) or head.get("kind") != MAGIC:
        raise DataError(
            f"{file}: line 1: no log of shardwise serve, whose first line has the kind {MAGIC!r}; "
            "give the FILE of shardwise serve --log"
        )
    if head.get("version") != VERSION:
        raise DataError(f"{file}: line 1: version {head.get('version')!r}; read here: {VERSION}")


def read(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, record) of all answers and feedback of a log, in the order of writing.

    Strict: raises DataError with file and line for whatever a server does not write. Half a last
    line of ``FILE`` (a crash, or a record that is being written) is left out.
    """
    while True:
        if not (found := parts(file)):
            raise DataError(f"{file}: no such log")
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(safe_files.open_regular(part)) for part in found]
            if parts(file) != found:  # rotated just now
                continue
            for part, stream in zip(found, streams, strict=True):
                yield from _read(stream, part, part == file)
        return


def _read(stream: BinaryIO, part: Path, newest: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of one file."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        where = f"{part}: line {number}"
        if len(line) > MAX_LINE:
            raise DataError(f"{where}: longer than {MAX_LINE:,} bytes")
        whole = line.endswith(b"\n")
        if number == 1:
            if whole or not (newest and _HEAD.startswith(line)):
                _check_head(line, part)
        elif whole:
            yield where, _record(line, where)
        elif not newest:
            raise DataError(f"{where}: ends in its middle")


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = safe_files.parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: no JSON: {error}") from None
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind == "answer":
        why = _wrong_answer(record)
    elif kind == "feedback":
        why = _wrong_feedback(record)
    else:
        why = "neither an answer nor feedback"
    if why:
        raise DataError(f"{where}: {why}")
    return record  # type: ignore[no-any-return]


def _wrong_answer(record: dict[str, Any]) -> str:
    """What is wrong with an answer; empty: nothing."""
    if set(record) != _ANSWER_KEYS:
        return f"an answer has the fields {', '.join(sorted(_ANSWER_KEYS))}"
    prompt = record["prompt"]
    messages = (
        isinstance(prompt, list)
        and prompt
        and all(
            isinstance(m, dict)
            and set(m) == {"role", "content"}
            and m["role"] in ("system", "user", "assistant")
            and isinstance(m["content"], str)
            for m in prompt
        )
    )
    if not (messages or isinstance(prompt, str)):
        return "prompt is neither a text nor messages of role and content"
    if not all(isinstance(record[k], str) for k in ("id", "client", "model")):
        return "id, client and model must be texts"
    choices = record["choices"]
    if not isinstance(choices, list) or not all(
        isinstance(c, dict) and isinstance(c.get("text"), str) for c in choices
    ):
        return "choices must be a list of objects with a text"
    return ""


def _wrong_feedback(record: dict[str, Any]) -> str:
    """What is wrong with feedback; empty: nothing."""
    if not set(record) <= _FEEDBACK_KEYS or not {"id", "choice", "client"} <= set(record):
        return f"feedback has the fields {', '.join(sorted(_FEEDBACK_KEYS))}"
    if not isinstance(record["id"], str) or not isinstance(record["client"], str):
        return "id and client must be texts"
    if type(record["choice"]) is not int:
        return "choice must be a whole number"
    rating, correction = record.get("rating"), record.get("correction")
    rated = type(rating) is int and rating in (1, -1)
    if rated == isinstance(correction, str) or (not rated and rating is not None):
        return "feedback holds either a rating (1 or -1) or a correction (a text)"
    return ""
