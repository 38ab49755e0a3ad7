"""Opening files and folders that somebody else may have made: regular, bounded, ours."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from shardwise.errors import DataError

MAX_TEXT_BYTES = 1 << 28  # of a file that is read whole: a tokenizer, a config, a template

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path | str) -> BinaryIO:
    """``path`` open for reading, if it is a regular file (or a link to one).

    A FIFO would wait for a writer for ever, and a device may have no end. Raises DataError for
    those, OSError for what cannot be opened.
    """
    try:  # O_NONBLOCK: opening a FIFO must not wait
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # a zero byte, half of a surrogate pair
        raise DataError(f"{os.fspath(path)!r}: cannot be read: {error}") from None
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise DataError(f"{path}: is a socket or a device, not a regular file") from None
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise DataError(f"{path}: is {_KINDS.get(kind, 'something else')}, not a regular file")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path | str, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The whole content of a regular file of at most ``max_bytes``. Raises DataError, OSError."""
    with open_regular(path) as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise DataError(f"{path}: more than {max_bytes:,} bytes, which no file of its kind has")
    return data


def read_text(path: Path | str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """`read_bytes` as UTF-8. Raises DataError naming the first byte that is not."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start}: not UTF-8 ({error.reason})") from None


def parse_json(data: bytes | str) -> Any:
    """JSON that somebody else may have written, in UTF-8.

    Raises ValueError with the reason, for deep nesting and half a surrogate pair (which no text
    made of it could be written with) too.
    """
    try:
        found = json.loads(data if isinstance(data, str) else data.decode("utf-8"))
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    return found


def cache_root() -> Path:
    """Where this user's caches lie: ``$XDG_CACHE_HOME/shardwise``, or below ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    # The specification wants a relative path ignored: it would follow the working directory.
    return Path(root if root and Path(root).is_absolute() else Path.home() / ".cache", "shardwise")


def distrust(path: Path | str) -> str | None:
    """Why what lies at ``path`` may be somebody else's; None if only we can have written it."""
    info = os.lstat(path)
    kind = stat.S_IFMT(info.st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        return f"{path} is {'a link' if kind == stat.S_IFLNK else _KINDS.get(kind, 'no file')}"
    if info.st_uid != os.geteuid():
        return f"{path} belongs to user {info.st_uid}, and we are {os.geteuid()}"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others (mode {stat.S_IMODE(info.st_mode):o})"
    return None


def private_folder(name: str) -> Path:
    """The folder ``name`` of `cache_root`, made if need be, which nobody else can write.

    Raises OSError when it cannot be made, PermissionError when `distrust` has a reason.
    """
    root = cache_root()
    root.parent.mkdir(parents=True, exist_ok=True)
    for folder in (root, root / name):
        folder.mkdir(mode=0o700, exist_ok=True)
        if reason := distrust(folder):
            raise PermissionError(
                f"{reason}, so its content is not trusted; remove it, or set XDG_CACHE_HOME"
            )
    return root / name
