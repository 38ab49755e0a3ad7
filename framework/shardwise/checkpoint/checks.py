"""Are the bytes of a checkpoint those that were written: `verify`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import xxhash

from shardwise.checkpoint import manifest, shards, steps
from shardwise.checkpoint.files import HASH_BYTES, opened, read_into
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
            with opened(directory, name) as file:
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
    buffer = memoryview(bytearray(min(size, HASH_BYTES)))
    for start in range(0, size, HASH_BYTES):
        piece = buffer[: min(HASH_BYTES, size - start)]
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
        if stored is None or stored.shape != chunk.region.shape:
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
