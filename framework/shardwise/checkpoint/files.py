"""Reading and syncing files without surprises: no symlinks, bounded sizes, regular files only."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HASH_BYTES = 1 << 20  # what is hashed and written at once: small enough to stay in the cache


def open_inside(directory: Path, name: str) -> int:
    """A descriptor, for the caller to close, to read the regular file ``directory/name``.

    No part of ``name`` may be a symlink, so a checkpoint cannot point out of its directory.
    Raises OSError.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *parents, last = name.split("/")
        for part in parents:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = below
        # O_NONBLOCK: opening a FIFO must not wait for a writer
        file = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)
    finally:
        os.close(handle)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(f"{name} is not a regular file")
    return file


@contextlib.contextmanager
def opened(directory: Path, name: str) -> Iterator[int]:
    """`open_inside` for a while."""
    file = open_inside(directory, name)
    try:
        yield file
    finally:
        os.close(file)


def read_small(directory: Path, name: str, max_bytes: int) -> bytes:
    """The whole content of a small file. Raises OSError if it is larger than ``max_bytes``."""
    with opened(directory, name) as file:
        size = os.fstat(file).st_size
        if size > max_bytes:
            raise OSError(f"{name} has {size} bytes, more than the {max_bytes} expected")
        with os.fdopen(os.dup(file), "rb") as stream:
            return stream.read(size)


def read_into(file: int, buffer: memoryview, position: int) -> None:
    """Fill ``buffer`` with the bytes at ``position``. Raises OSError if the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done : done + (1 << 30)]], position + done)
        if count == 0:
            raise OSError(f"the file ends at byte {position + done}")
        done += count


def write_all(file: int, data: Any) -> None:
    """Write all of a bytes-like object, however much one system call takes."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(file, view[: 1 << 30]) :]


def start_write_back(file: int, start: int, num_bytes: int) -> None:
    """Have the kernel send these bytes to the disk now, without waiting for it.

    Otherwise the disk would idle until the sync at the end: a third of the time of a large save.
    Linux starts the write-back of dirty pages when told that they will not be needed.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, start, num_bytes, os.POSIX_FADV_DONTNEED)
