"""Looking at checkpoints without loading them: `inspect`, `verify`, `diff`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from shardwise.checkpoint import manifest, shards, steps
from shardwise.checkpoint.files import PIECE_BYTES, read_into, reading
from shardwise.checkpoint.manifest import Chunk, DamagedError, Manifest


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a checkpoint. ``tensor`` is empty where no tensor is hurt."""

    file: str
    tensor: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}: {f'tensor {self.tensor}: ' if self.tensor else ''}{self.detail}"


def verify(path: Path | str) -> list[Problem]:
    """Every problem of a checkpoint, or an empty list: each byte is read and hashed."""
    directory = steps.resolve(path)
    try:
        book = manifest.read(directory)
    except DamagedError as error:
        return [Problem(str(directory / manifest.NAME), "", str(error))]
    problems = check_files(directory, book, sorted(book.files), hashes=True)
    for found in sorted(p for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = found.relative_to(directory).as_posix()
        if name != manifest.NAME and name not in book.files:
            problems.append(Problem(str(found), "", "is not part of the checkpoint"))
    return problems


def check_files(
    directory: Path, book: Manifest, names: Iterable[str], *, hashes: bool
) -> list[Problem]:
    """Problems of some of the files: missing, of another size, or (``hashes``) of other bytes."""
    inside: dict[str, list[tuple[str, Chunk]]] = {}
    for tensor, entry in book.tensors.items():
        for chunk in entry.chunks:
            inside.setdefault(chunk.file, []).append((tensor, chunk))
    problems: list[Problem] = []
    for name in names:
        path, expected, chunks = str(directory / name), book.files[name], inside.get(name, [])
        try:
            with reading(directory, name) as file:
                size = os.fstat(file).st_size
                if size != expected.size:
                    what = f"has {size} bytes where {expected.size} were written"
                elif hashes and _hash(file, size) != expected.xxh3_128:
                    what = "the bytes are not those written"
                else:
                    table = shards.read_header(file, path) if chunks else {}
                    wrong = [t for t, c in chunks if c.key not in table]
                    problems += [Problem(path, t, "is not in the file") for t in wrong]
                    continue
                hurt = _hurt(file, book, chunks) if chunks else []
        except FileNotFoundError:
            what, hurt = "is missing", [t for t, _ in chunks]
        except DamagedError as error:
            what, hurt = str(error), [t for t, _ in chunks]
        except OSError as error:
            what, hurt = f"cannot be read ({error})", [t for t, _ in chunks]
        problems += [Problem(path, t, what) for t in dict.fromkeys(hurt)]
        if not hurt:
            header = "; only the header is hurt, no values" if chunks else ""
            problems.append(Problem(path, "", what + header))
    return problems


def _hash(file: int, size: int) -> str:
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(size, PIECE_BYTES)))
    for start in range(0, size, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, size - start)]
        read_into(file, piece, start)
        hasher.update(piece)
    return hasher.hexdigest()


def _hurt(file: int, book: Manifest, chunks: list[tuple[str, Chunk]]) -> list[str]:
    """The tensors of a damaged file whose bytes changed; all of them if its header did too."""
    try:
        table = shards.read_header(file, "", complete=False)
    except DamagedError:
        return [tensor for tensor, _ in chunks]
    hurt = []
    for tensor, chunk in chunks:
        stored = table.get(chunk.key)
        if stored is None or stored.shape != chunk.box.shape:
            hurt.append(tensor)
            continue
        try:
            found = []
            for start in range(0, stored.num_bytes, book.block_bytes):
                block = memoryview(bytearray(min(book.block_bytes, stored.num_bytes - start)))
                read_into(file, block, stored.start + start)
                found.append(xxhash.xxh3_128_hexdigest(block))
        except OSError:  # the file ends before
            found = []
        if found != list(chunk.hashes):
            hurt.append(tensor)
    return hurt


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """One tensor: dtype under its safetensors name, global shape, bytes, how often it is cut."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    num_chunks: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `inspect` tells."""

    path: str
    step: int
    digest: str
    versions: dict[str, str]
    num_tensors: int
    num_elements: int
    num_bytes: int  # of all files but the manifest
    tensors: list[TensorSummary]
    files: dict[str, int]  # bytes by name
    meta: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def inspect(path: Path | str) -> Summary:
    """What a checkpoint holds, from its manifest alone."""
    directory = steps.resolve(path)
    book = manifest.read(directory)
    tensors = [
        TensorSummary(n, e.dtype, e.shape, e.num_bytes, len(e.chunks))
        for n, e in book.tensors.items()
    ]
    return Summary(
        path=str(directory),
        step=book.step,
        digest=book.digest,
        versions=book.versions,
        num_tensors=len(tensors),
        num_elements=sum(e.num_elements for e in book.tensors.values()),
        num_bytes=sum(f.size for f in book.files.values()),
        tensors=tensors,
        files={name: f.size for name, f in book.files.items()},
        meta=book.meta,
    )
