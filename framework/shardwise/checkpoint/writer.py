"""Everything that touches the disk during a save, one method a phase, in the order of a save:

stage -> shard (every rank, every file) -> manifest -> rename -> pointer -> prune

Only after `rename` does the checkpoint exist; only after `pointer` may older ones go.
"""

from __future__ import annotations

import errno
import fcntl
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
from shardwise.checkpoint.files import HASH_BYTES, start_write_back, write_all
from shardwise.checkpoint.manifest import BLOCK_BYTES, FileEntry, NonFiniteError
from shardwise.errors import CheckpointError
from shardwise.storage.durable import explain, make_folder, set_aside, sync_folder

log = logging.getLogger(__name__)
T = TypeVar("T")

# Storage that may well answer a second later; a full or read-only disk will not.
TRANSIENT = {
    errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY,
    errno.ENOTCONN, errno.EREMOTEIO,
}  # fmt: skip
WRITE_BACK_BYTES = 64 << 20


class Writer:
    """Writes a checkpoint. Transient faults are retried ``retries`` times, the pause doubling.

    ``sleep`` is called with the pause in seconds.
    """

    # Directories that this process is writing, and the descriptors that say so to others.
    in_progress: ClassVar[dict[Path, int]] = {}

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
            make_folder(root)
            for stale in steps.leftovers(root):
                if stale not in self.in_progress:
                    self._remove_leftover(stale)
            while True:
                staged = root / f"{steps.directory_name(step)}.tmp-{secrets.token_hex(6)}"
                self.in_progress[staged] = -1  # lest a save in another thread removes it
                staged.mkdir()
                self.in_progress[staged] = _open_folder(staged, fcntl.LOCK_SH)
                if staged.exists():  # else a neighbour came between
                    return staged
                self._settle(staged)

        return self.attempt(root, make)

    def _remove_leftover(self, stale: Path) -> None:
        """Remove what an interrupted save left, unless its writer lives in another process."""
        if not stale.is_dir():
            stale.unlink(missing_ok=True)
            return
        try:
            handle = _open_folder(stale, fcntl.LOCK_EX)
        except BlockingIOError:
            log.info("%s: another process is writing it", stale)
            return
        try:
            log.warning("%s: removing what an interrupted save left", stale)
            self.remove_tree(stale)
        finally:
            os.close(handle)

    def _settle(self, staged: Path) -> None:
        """It is no longer being written."""
        if (handle := self.in_progress.pop(staged, -1)) >= 0:
            os.close(handle)

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

        def blocks() -> Iterable[Any]:
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
        entry = self.attempt(path, lambda: self._file(path, blocks()))
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
                    sync_folder(directory / parent)
                return entry

            entries[name] = self.attempt(path, write)
        return entries

    def manifest(self, directory: Path, data: bytes) -> None:
        """Write the manifest, the last file, and make all names in the directory durable."""

        def write() -> None:
            self._file(directory / manifest.NAME, [data])
            sync_folder(directory)

        self.attempt(directory / manifest.NAME, write)

    def rename(self, staged: Path, final: Path) -> None:
        """Commit: give the directory its name. An older one of the same name moves aside first."""
        aside = final.with_name(f"{final.name}.old-{secrets.token_hex(6)}")

        def commit() -> None:
            if staged.exists():  # not so in a retry after a failed sync
                if final.exists():
                    final.rename(aside)
                staged.rename(final)
            sync_folder(final.parent)

        self.attempt(final, commit)
        self._settle(staged)
        if aside.exists():
            self._remove(aside)

    def pointer(self, root: Path, name: str, fields: Mapping[str, Any]) -> None:
        """Replace a pointer file atomically."""
        fresh = root / f".{name}.tmp-{secrets.token_hex(6)}"

        def write() -> None:
            try:
                self._file(fresh, [manifest.seal(fields)])
                if (root / name).is_dir():
                    set_aside(root / name, "a folder stands in the place of a pointer")
                fresh.rename(root / name)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise
            sync_folder(root)

        self.attempt(root / name, write)

    def prune(self, root: Path, keep: int, protect: Collection[int] = ()) -> list[Path]:
        """Remove committed checkpoints beyond the ``keep`` newest; returns those removed."""
        removed = steps.surplus(root, keep, protect)
        for directory in removed:
            self._remove(directory)
        return removed

    def discard(self, staged: Path) -> None:
        """Remove a directory that will not be committed; a failure is only told."""
        try:
            self._settle(staged)
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
                    tried = f" after {self.retries - left} retries" if left < self.retries else ""
                    raise CheckpointError(explain(error, path, tried)) from error
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


def _open_folder(folder: Path, lock: int) -> int:
    """A descriptor with a lock on it where the file system has some; it dies with the process.

    Raises BlockingIOError for an exclusive one that somebody else's stands against.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, lock | fcntl.LOCK_NB if lock == fcntl.LOCK_EX else lock)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError as error:  # NFS has none for folders: there the run's lock must do
        log.debug("%s: no lock (%s)", folder, error)
    return handle


def _pieces(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), HASH_BYTES):
        yield data[start : start + HASH_BYTES]
