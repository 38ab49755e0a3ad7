"""Writing so that a crash or a power loss leaves the old content or the new, never a part.

A file is on disk once its bytes are synced *and* its name is: the folder is synced too, and so is
the folder of every folder that was made for it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from shardwise.errors import ShardwiseError

log = logging.getLogger(__name__)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM}
# What says that the storage is at fault, not the program or its input.
FAULTS = FULL | FORBIDDEN | {errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV}
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")  # how tokenizers and safetensors tell it


class StorageError(ShardwiseError):
    """The disk is full, read-only or broken; the message names the file and the mend."""


def write_durably(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step; on return it is on disk under its name.

    Something else of that name (a folder) is moved aside. Raises StorageError.
    """
    fresh = path.with_name(f".{path.name}.tmp-{secrets.token_hex(6)}")
    with named(path):
        make_folder(path.parent)
        try:
            with fresh.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            if path.is_dir():
                set_aside(path, "a folder stands in the place of a file")
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each on disk under its name. Raises OSError."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make a folder durable with all that is in it, whoever wrote it. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def set_aside(path: Path, why: str) -> Path:
    """Move what cannot be used out of the way, kept under a name that is told; returns it."""
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    with named(path):
        path.rename(kept)
        sync_folder(path.parent)
    log.warning("%s: %s; kept as %s", path, why, kept.name)
    return kept


def explain(error: OSError, path: Path | str, tried: str = "") -> str:
    """The file, what is wrong and what to do, in one line; ``tried``: " after 3 retries"."""
    number, detail = error.errno, error.strerror or str(error)
    if number in FULL:
        limit = " (a file size limit or quota)" if number != errno.ENOSPC else ""
        return (
            f"{path}: disk full{limit}; free some space, keep fewer checkpoints or move the run "
            f"({detail})"
        )
    if number == errno.EROFS:
        return f"{path}: the storage is read-only; remount it or move the run"
    if number in FORBIDDEN:
        return (
            f"{path}: no permission to write there ({detail}); change its owner or mode, or move "
            "the run"
        )
    mend = "; look at the disk or the network behind it" if number in FAULTS else ""
    return f"{path}: cannot be written{tried} ({detail}){mend}"


@contextlib.contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Turn an OSError of the body into a StorageError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(explain(error, path)) from error


@contextlib.contextmanager
def told(path: Path | str) -> Iterator[None]:
    """Around much work in ``path``: a fault of the storage, however deep, becomes a StorageError.

    Libraries wrap such errors in their own (compilers, tokenizers, safetensors).
    """
    try:
        yield
    except ShardwiseError:
        raise
    except Exception as error:
        if (fault := _fault(error)) is None:
            raise
        raise StorageError(explain(fault, fault.filename or path)) from error


def _fault(error: BaseException | None) -> OSError | None:
    """The storage's fault that is behind an error."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in FAULTS:
            return error
        match = _RUST_ERRNO.search(str(error))
        if match and int(match[1]) in FAULTS:
            return OSError(int(match[1]), os.strerror(int(match[1])))
        error = error.__cause__ or error.__context__
    return None
