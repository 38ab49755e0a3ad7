"""The corpus that every machine has: the source of the running Python's standard library.

All ``.py`` files outside test folders and installed packages, sorted by relative path. The
validation split is the 40 modules of 4 to 20 KiB with the lowest sha256 of their relative path
(POSIX form): a hash of names, not of contents, so that the split hardly moves between Python
versions, and sizes so much alike that no module decides the figure (the largest is a twentieth of
the bytes at most; by the hash alone, one file was three quarters). Where fewer modules have such a
size, those of other sizes follow, by the same hash.
"""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Literal

from shardwise.data.readers import Document
from shardwise.errors import DataError

Split = Literal["train", "validation", "all"]
NUM_HELD_OUT = 40
HELD_OUT_BYTES = (4 << 10, 20 << 10)
_EXCLUDED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


def stdlib_folder() -> Path:
    """Where the running Python keeps its library (the base one, also inside a venv)."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(
    split: Split = "all", folder: Path | None = None, exclude: Sequence[str] = ()
) -> list[Path]:
    """Absolute paths of a split's modules, sorted by relative path; DataError if there is none.

    ``exclude``: patterns (`Path.match`) of modules to leave out before the split is drawn.
    """
    root = folder or stdlib_folder()
    names = sorted(
        name
        for name in _sources(root)
        if not any(PurePath(name).match(pattern) for pattern in exclude) and (root / name).is_file()
    )
    if not names:
        raise DataError(f"{root}: no Python sources there; give the source a path or other data")
    if split != "all":
        held_out = set(sorted(names, key=lambda n: _held_out_rank(root, n))[:NUM_HELD_OUT])
        names = [n for n in names if (n in held_out) == (split == "validation")]
    return [root / n for n in names]


def _sources(root: Path) -> Iterator[str]:
    """Relative paths of all sources, in POSIX form; excluded folders are not entered."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED]
        inside = Path(folder).relative_to(root).as_posix()
        for file in files:
            if file.endswith(".py"):
                yield file if inside == "." else f"{inside}/{file}"


def _held_out_rank(root: Path, name: str) -> tuple[bool, str]:
    """Sort key: the lower, the sooner a module is held out."""
    smallest, largest = HELD_OUT_BYTES
    fits = smallest <= (root / name).stat().st_size <= largest
    return not fits, hashlib.sha256(name.encode()).hexdigest()


def read_stdlib(
    split: Split = "all", folder: Path | None = None, exclude: Sequence[str] = ()
) -> Iterator[Document]:
    """Each module is a document named by its relative path."""
    root = folder or stdlib_folder()
    for file in stdlib_files(split, root, exclude):
        yield Document(file.relative_to(root).as_posix(), _source_text(file))


def _source_text(file: Path) -> str:
    """UTF-8, or what the module's coding line declares."""
    data = file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: byte {at}: not in its declared encoding: {error}") from error
