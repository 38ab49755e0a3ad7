"""Which files a path means, and what their contents hash to."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import xxhash

from shardwise.data.left_out import OTHER_FILE, leave_out
from shardwise.data.streams import suffix_of
from shardwise.errors import DataError

log = logging.getLogger(__name__)


def find_files(path: Path | str, suffixes: Sequence[str] = ()) -> list[Path]:
    """The files of a path: one file, a folder (recursively, by suffix) or a glob; sorted.

    A name that exists is that file or folder, glob characters or not. In a folder

    - what is hidden (a name with a dot in front, of a file or of a folder on the way) is no data;
    - links are followed wherever they lead; a file that is found twice is read once, and a folder
      that leads back into itself is entered once;
    - files of another suffix are left out, and named. ``suffixes`` are those of what a compressed
      file holds: ``.jsonl`` takes ``a.jsonl.gz``.

    Raises DataError when there is no file, for a link that leads nowhere, and for a folder that
    cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        return [path]  # whoever opens it refuses what is no regular file
    folders = [path] if path.is_dir() else []
    found: list[Path] = []
    if not folders:
        matches = [Path(p) for p in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        found = [p for p in matches if not p.is_dir()]
        folders = [p for p in matches if p.is_dir()] if "**" not in path.parts else []
    for folder in folders:
        found += _by_suffix(folder, list(_walk(folder)), suffixes)
    if not found:
        wanted = f" ending in {', '.join(suffixes)}" if suffixes else ""
        raise DataError(f"{path}: no such file, or no files{wanted} there")
    return list(_once(sorted(found, key=lambda p: p.as_posix())))


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    entered = set()
    for name, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        info = os.stat(name)  # noqa: PTH116
        if (info.st_dev, info.st_ino) in entered:
            folders.clear()
            continue
        entered.add((info.st_dev, info.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(n for n in names if not n.startswith(".")):
            where = Path(name, file)
            if where.is_symlink() and not where.exists():
                raise DataError(f"{where}: the link leads nowhere ({os.readlink(where)})")  # noqa: PTH115
            if where.is_file():
                yield where


def _by_suffix(folder: Path, files: list[Path], suffixes: Sequence[str]) -> list[Path]:
    if not suffixes:
        return files
    unread = [f for f in files if suffix_of(f) not in suffixes]
    others = Counter(suffix_of(f) or "no suffix" for f in unread)
    for file in unread:
        leave_out(OTHER_FILE, str(file))
    if others:
        said = ", ".join(f"{number} of {suffix}" for suffix, number in sorted(others.items()))
        log.info("%s: only files of %s are read; left out: %s", folder, "/".join(suffixes), said)
    return [f for f in files if suffix_of(f) in suffixes]


def _once(files: Iterable[Path]) -> Iterator[Path]:
    """Each real file by the first of its names."""
    first: dict[Path, Path] = {}
    for file in files:
        real = file.resolve()
        if first.setdefault(real, file) is file:
            yield file
        else:
            log.warning("%s: the same file as %s, read once", file, first[real])


def fingerprint(files: Iterable[Path]) -> str:
    """xxh3-128 of the files' names and contents, in the given order; independent of the folder."""
    total = xxhash.xxh3_128()
    for file in files:
        total.update(file.name.encode() + b"\0" + hash_file(file).encode())
    return total.hexdigest()


def hash_file(file: Path) -> str:
    """xxh3-128 of one file's content."""
    state = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            state.update(block)
    return state.hexdigest()
