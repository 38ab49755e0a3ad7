"""Everything that touches the disk during a save, one method a phase, in the order of a save:

stage -> shard (every rank, every file) -> manifest -> rename -> pointer -> prune

Only after `rename` does the checkpoint exist; only after `pointer` may older ones go.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import xxhash
from torch import Tensor

from shardwise.checkpoint import manifest, shards, steps
from shardwise.checkpoint.files import PIECE_BYTES, start_write_back, sync_directory, write_all
from shardwise.checkpoint.manifest import BLOCK_BYTES, FileEntry, NonFiniteError
from shardwise.errors import CheckpointError

log = logging.getLogger(__name__)
T = TypeVar("T")

# Storage that may well answer a second later; a full or read-only disk will not.
TRANSIENT = {
    errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY,
    errno.ENOTCONN, errno.EREMOTEIO,
}  # fmt: skip
WRITE_BACK_BYTES = 64 << 20
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Writer:
    """Writes a checkpoint. Transient faults are retried ``retries`` times, the pause doubling.

    ``sleep`` is called with the pause in seconds.
    """

    in_progress: ClassVar[set[Path]] = set()  # directories that this process is writing

    def __init__(
        self,
        retries: int = 4,
        backoff_seconds: float = 0.5,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.retries = retries
        self.backoff_seconds = backoff_seconds
        self.sleep = sleep

    def stage(self, root: Path, step: int) -> Path:
        """Remove what killed saves left behind and make a fresh directory to write in."""

        def make() -> Path:
            root.mkdir(parents=True, exist_ok=True)
            for stale in steps.leftovers(root):
                if stale not in self.in_progress:
                    log.warning("%s: removing what an interrupted save left", stale)
                    self.remove_tree(stale) if stale.is_dir() else stale.unlink()
            staged = root / f"{steps.directory_name(step)}.tmp-{secrets.token_hex(6)}"
            self.in_progress.add(staged)  # before it exists, lest a save beside us removes it
            staged.mkdir()
            return staged

        return self.attempt(root, make)

    def shard(
        self,
        directory: Path,
        name: str,
        index: int,
        tensors: Sequence[tuple[str, Tensor]],
        nonfinite: Collection[str] = (),
    ) -> tuple[FileEntry, list[list[str]]]:
        """Write file number ``index`` of this rank: ``tensors`` (key, values on any device).

        Returns the file's entry and the block hashes of each tensor, made from memory. Raises
        NonFiniteError for a value that is not finite in a tensor that ``nonfinite`` does not name.
        """
        head = shards.header([(key, t.dtype, t.shape) for key, t in tensors])
        block_hashes: list[list[str]] = []

        def pieces() -> Iterable[Any]:
            block_hashes.clear()  # a retry starts over
            yield head
            for key, tensor in tensors:
                # one at a time; copied only if on a device or strided
                values = tensor.contiguous().cpu()
                data = shards.bytes_of(values)
                hashes: list[str] = []
                block_hashes.append(hashes)
                for start in range(0, len(data), BLOCK_BYTES):
                    hasher = xxhash.xxh3_128()
                    for piece in _pieces(data[start : start + BLOCK_BYTES]):
                        # while the piece is in the cache
                        part = torch.frombuffer(piece, dtype=values.dtype)
                        if not shards.is_finite(part) and key not in nonfinite:
                            raise NonFiniteError(shards.first_nonfinite(key, values))
                        hasher.update(piece)
                        yield piece
                    hashes.append(hasher.hexdigest())

        path = directory / name
        entry = self.attempt(path, lambda: self._file(path, pieces()))
        return entry, block_hashes

    def extras(self, directory: Path, files: Mapping[str, bytes]) -> dict[str, FileEntry]:
        """Write small files as they are. Names were checked before."""
        entries = {}
        for name, data in files.items():
            path = directory / name

            def write(path: Path = path, data: bytes = data) -> FileEntry:
                path.parent.mkdir(parents=True, exist_ok=True)
                entry = self._file(path, [data])
                for parent in path.relative_to(directory).parents[:-1]:
                    sync_directory(directory / parent)
                return entry

            entries[name] = self.attempt(path, write)
        return entries

    def manifest(self, directory: Path, data: bytes) -> None:
        """Write the manifest, the last file, and make all names in the directory durable."""

        def write() -> None:
            self._file(directory / manifest.NAME, [data])
            sync_directory(directory)

        self.attempt(directory / manifest.NAME, write)

    def rename(self, staged: Path, final: Path) -> None:
        """Commit: give the directory its name. An older one of the same name moves aside first."""
        aside = final.with_name(f"{final.name}.old-{secrets.token_hex(6)}")

        def commit() -> None:
            if staged.exists():  # not so in a retry after a failed sync
                if final.exists():
                    final.rename(aside)
                staged.rename(final)
            sync_directory(final.parent)

        self.attempt(final, commit)
        self.in_progress.discard(staged)
        if aside.exists():
            self._remove(aside)

    def pointer(self, root: Path, name: str, fields: Mapping[str, Any]) -> None:
        """Replace a pointer file atomically."""
        fresh = root / f".{name}.tmp-{secrets.token_hex(6)}"

        def write() -> None:
            try:
                self._file(fresh, [manifest.seal(fields)])
                fresh.rename(root / name)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise
            sync_directory(root)

        self.attempt(root / name, write)

    def prune(self, root: Path, keep: int, protect: Collection[int] = ()) -> list[Path]:
        """Remove committed checkpoints beyond the ``keep`` newest; returns those removed."""
        removed = steps.surplus(root, keep, protect)
        for directory in removed:
            self._remove(directory)
        return removed

    def discard(self, staged: Path) -> None:
        """Remove a directory that will not be committed; a failure is only told."""
        self.in_progress.discard(staged)
        try:
            self.remove_tree(staged)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s: the partial checkpoint cannot be removed (%s)", staged, error)

    def remove_tree(self, directory: Path) -> None:
        """Remove a directory that is no checkpoint, or no longer."""
        shutil.rmtree(directory)

    def attempt(self, path: Path, action: Callable[[], T]) -> T:
        """Run ``action``; retry transient faults; name ``path`` and the mend otherwise."""
        pause = self.backoff_seconds
        for left in range(self.retries, -1, -1):
            try:
                return action()
            except OSError as error:
                if error.errno not in TRANSIENT or not left:
                    raise _explained(error, path, self.retries - left) from error
                log.warning("%s: %s; trying again in %g s", path, error.strerror, pause)
            self.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def open(self, path: Path) -> int:
        """Create a file, or empty it in a retry: after a failed write or sync all is rewritten."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)

    def write(self, file: int, data: Any) -> None:
        """Write all of ``data``."""
        write_all(file, data)

    def sync(self, file: int) -> None:
        """Make a file's content durable."""
        os.fsync(file)

    def _file(self, path: Path, parts: Iterable[Any]) -> FileEntry:
        """Write a file and hash what is in memory on the way, so later damage is noticed."""
        hasher = xxhash.xxh3_128()
        size = handed_over = 0
        file = self.open(path)
        try:
            for part in parts:
                for piece in _pieces(memoryview(part)):
                    hasher.update(piece)
                    self.write(file, piece)
                    size += len(piece)
                    if size - handed_over >= WRITE_BACK_BYTES:
                        start_write_back(file, handed_over, size - handed_over)
                        handed_over = size
            self.sync(file)
        finally:
            os.close(file)
        return FileEntry(size, hasher.hexdigest())

    def _remove(self, directory: Path) -> None:
        """Remove a committed directory: it stops being one before the first file goes."""
        name = directory.name.partition(".")[0]
        doomed = directory.with_name(f"{name}.tmp-{secrets.token_hex(6)}")
        try:
            directory.rename(doomed)
            self.remove_tree(doomed)
        except OSError as error:
            log.warning("%s: cannot be removed (%s); its space stays taken", directory, error)


def _pieces(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def _explained(error: OSError, path: Path, retried: int) -> CheckpointError:
    number = error.errno
    if number in FULL:
        limit = " (a file size limit or quota)" if number != errno.ENOSPC else ""
        mend = f"disk full{limit}; free some space, keep fewer checkpoints or move the run"
        return CheckpointError(f"{path}: {mend} ({error.strerror})")
    if number == errno.EROFS:
        return CheckpointError(f"{path}: the storage is read-only; remount it or move the run")
    if number in (errno.EACCES, errno.EPERM):
        return CheckpointError(f"{path}: no permission to write there ({error.strerror})")
    tried = f" after {retried} retries" if retried else ""
    return CheckpointError(f"{path}: cannot be written{tried} ({error.strerror or error})")
