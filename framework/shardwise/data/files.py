"""Which files a path means, and what their contents hash to."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from shardwise.errors import DataError


def find_files(path: Path | str, suffixes: Sequence[str] = ()) -> list[Path]:
    """The files of a path: one file, a folder (recursively, by suffix) or a glob; sorted.

    Raises DataError when there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
        found = [p for p in found if not suffixes or p.suffix.lower() in suffixes]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]  # noqa: PTH207
    if not found:
        wanted = f" ending in {', '.join(suffixes)}" if suffixes else ""
        raise DataError(f"{path}: no such file, or no files{wanted} there")
    return sorted(found, key=lambda p: p.as_posix())


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
