"""Loading: from any layout into any other, in place, and never bytes that were not written."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.autograd.graph import increment_version

from shardwise.checkpoint import checks, manifest, shards, steps
from shardwise.checkpoint.files import open_inside, read_into, read_small
from shardwise.checkpoint.manifest import (
    Chunk,
    DamagedError,
    Manifest,
    MismatchError,
    NonFiniteError,
    TensorEntry,
)
from shardwise.checkpoint.ranks import Ranks
from shardwise.checkpoint.shards import DTYPE_NAMES, DTYPES
from shardwise.errors import CheckpointError
from shardwise.ops.local_shards import LocalShard, local_shards
from shardwise.ops.regions import Region, overlap

log = logging.getLogger(__name__)

Verify = Literal["full", "fast", "off"]
READ_BYTES = 256 << 20  # most that is read at once where a copy is needed
MAX_LISTED = 20
MAX_OPEN_FILES = 128  # a checkpoint may have more files than a process may open


class Loaded(NamedTuple):
    """What `load_latest` found."""

    path: Path
    step: int
    meta: dict[str, Any]


def load(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    *,
    verify: Verify = "full",
    partial: bool = False,
    nonfinite: Collection[str] = (),
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fill ``tensors`` (plain or DTensors of any placement) in place; a collective call.

    Args:
        path: a checkpoint directory, or a folder of them (its latest is taken).
        verify: "full" hashes every file, shared among the ranks, before the first value is
            written, and what is read once more; "fast" hashes what is read; "off" hashes nothing
            but the manifest.
        partial: allow tensors in the checkpoint that no rank asks for.
        nonfinite: as for `save`.

    Returns the checkpoint's meta. Raises MismatchError if names, shapes or dtypes do not fit, and
    DamagedError if the files are not what was written. Both come before anything is written into
    ``tensors``, but for damage found while reading ("fast", or storage that changes its mind) and
    for a NonFiniteError: values that nothing sound can have written.
    """
    if verify not in ("full", "fast", "off"):
        raise CheckpointError(f"verify={verify!r}; allowed: full, fast, off")
    ranks = Ranks.of(group)
    book: Manifest | None = None
    parts: dict[str, list[LocalShard]] = {}
    directory = Path(path)
    with ranks.together():
        directory = steps.resolve(path)
        book = manifest.read(directory)
        _check_fit(directory, book, tensors)
        parts = {name: local_shards(name, tensor) for name, tensor in tensors.items()}
    assert book is not None
    with ranks.together():
        if len(set(ranks.exchange(book.digest))) > 1:
            raise CheckpointError(f"{directory}: the ranks see different checkpoints there")
        if not partial:
            _check_all_wanted(ranks, directory, book, tensors)
    if verify != "off":
        with ranks.together():
            _check_files(ranks, directory, book, full=verify == "full")
    with ranks.together(), torch.no_grad(), Reader(directory, book, verify != "off") as reader:
        for name, wanted in parts.items():
            for shard in wanted:
                reader.fill(name, shard)
                if not shards.is_finite(shard.view) and name not in nonfinite:
                    raise NonFiniteError(
                        f"{directory}: {shards.first_nonfinite(name, shard.view)}; it cannot be "
                        "trained or started from"
                    )
    return book.meta


def load_latest(
    root: Path | str,
    tensors: Mapping[str, Tensor],
    strict: bool = False,
    *,
    verify: Verify = "full",
    partial: bool = False,
    nonfinite: Collection[str] = (),
    group: dist.ProcessGroup | None = None,
) -> Loaded | None:
    """`load` the newest checkpoint under ``root``; None if there is none; a collective call.

    One that is damaged, or holds values that are not finite, is passed over with a warning for
    the one before it, unless ``strict``.
    """
    root = Path(root)
    ranks = Ranks.of(group)
    names: list[str] = []
    with ranks.together():
        if ranks.rank == 0 and (newest := steps.latest(root)):
            found = steps.committed(root)
            older = [d for s, d in found.items() if s < steps.step_of(newest)]
            names = [d.name for d in [newest, *older[:-2:-1]]]
    names = ranks.share(names)
    for name, fallback in zip(names, [*names[1:], None]):
        try:
            meta = load(
                root / name,
                tensors,
                verify=verify,
                partial=partial,
                nonfinite=nonfinite,
                group=group,
            )
        except DamagedError as error:
            if strict or fallback is None:
                raise
            log.warning("%s; falling back to %s", error, fallback)
        else:
            return Loaded(root / name, steps.step_of(root / name), meta)
    return None


def read_meta(path: Path | str) -> dict[str, Any]:
    """The JSON part of a checkpoint; not a collective call."""
    return manifest.read(steps.resolve(path)).meta


def read_files(path: Path | str) -> dict[str, bytes]:
    """The small files of a checkpoint by name, verified; not a collective call."""
    directory = steps.resolve(path)
    book = manifest.read(directory)
    result = {}
    for name, entry in book.files.items():
        if name in book.shard_names:
            continue
        try:
            data = read_small(directory, name, entry.size)
        except OSError as error:
            raise DamagedError(f"{directory / name}: cannot be read ({error})") from None
        if len(data) != entry.size or xxhash.xxh3_128_hexdigest(data) != entry.xxh3_128:
            raise DamagedError(f"{directory / name}: the content is not what was written")
        result[name] = data
    return result


def read_tensors(
    path: Path | str,
    select: Callable[[str], bool] = lambda name: True,
    *,
    verify: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors whose names ``select`` accepts, one at a time; not a collective call."""
    directory = steps.resolve(path)
    book = manifest.read(directory)
    with Reader(directory, book, verify) as reader:
        for name in filter(select, book.tensors):
            yield name, reader.full_tensor(name)


class Reader:
    """Reads regions of tensors from the files of one checkpoint; keeps their headers."""

    def __init__(self, directory: Path, book: Manifest, verify: bool) -> None:
        self.directory = directory
        self.book = book
        self.verify = verify
        self._files: dict[str, int] = {}  # open descriptors, the oldest first
        self._headers: dict[str, dict[str, shards.Stored]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def full_tensor(self, name: str) -> Tensor:
        """A new CPU tensor with all of ``name``."""
        entry = self.book.tensors[name]
        for chunk in entry.chunks:  # before memory is taken: the files really hold that much
            self._open(name, entry, chunk)
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        for shard in local_shards(name, tensor):
            self.fill(name, shard)
        return tensor

    def fill(self, name: str, shard: LocalShard) -> None:
        """Write the region of ``shard`` into its memory."""
        entry = self.book.tensors[name]
        for chunk in entry.chunks:
            common = overlap(chunk.region, shard.region)
            if common is None:
                continue
            file, stored = self._open(name, entry, chunk)
            target = shard.view[common.relative_to(shard.region.offset)]
            try:
                self._copy(file, name, chunk, stored, common, target)
            except OSError as error:
                raise DamagedError(
                    f"{self.directory / chunk.file}: tensor {name}: cannot be read ({error})"
                ) from None

    def _copy(
        self,
        file: int,
        name: str,
        chunk: Chunk,
        stored: shards.Stored,
        common: Region,
        target: Tensor,
    ) -> None:
        """Copy ``common`` out of ``chunk``, reading whole rows, or straight into the target."""
        if common == chunk.region and target.is_contiguous() and target.device.type == "cpu":
            data = shards.bytes_of(target)
            read_into(file, data, stored.start)
            self._check_blocks(name, chunk, data, 0)
            increment_version(target)  # as an operator would: some look whether they were written
            return
        num_rows = chunk.region.shape[0] if chunk.region.shape else 1
        row_bytes = stored.num_bytes // num_rows
        first = common.offset[0] - chunk.region.offset[0] if chunk.region.shape else 0
        count = common.shape[0] if chunk.region.shape else 1
        step = max(1, READ_BYTES // row_bytes)
        inner = common.relative_to(chunk.region.offset)[1:]
        for start in range(0, count, step):
            rows = min(step, count - start)
            low, high = (first + start) * row_bytes, (first + start + rows) * row_bytes
            block = self.book.block_bytes
            begin = low // block * block if self.verify else low
            end = min(-(-high // block) * block, stored.num_bytes) if self.verify else high
            buffer = torch.empty(end - begin, dtype=torch.uint8)
            data = shards.bytes_of(buffer)
            read_into(file, data, stored.start + begin)
            self._check_blocks(name, chunk, data, begin // block)
            values = buffer[low - begin : high - begin].view(DTYPES[stored.dtype])
            if not chunk.region.shape:
                target.copy_(values.view(()))
                return
            values = values.view(rows, *chunk.region.shape[1:])
            target[start : start + rows].copy_(values[(slice(None), *inner)])

    def _check_blocks(self, name: str, chunk: Chunk, data: memoryview, first: int) -> None:
        if not self.verify:
            return
        block = self.book.block_bytes
        for index, found in enumerate(shards.block_hashes(data, block), first):
            if found != chunk.hashes[index]:
                raise DamagedError(
                    f"{self.directory / chunk.file}: tensor {name}: the bytes read are not those "
                    f"written (block {index} of {block} bytes of the chunk at "
                    f"{list(chunk.region.offset)}); the tensors given may be partly overwritten"
                )

    def _open(self, name: str, entry: TensorEntry, chunk: Chunk) -> tuple[int, shards.Stored]:
        path = self.directory / chunk.file
        if chunk.file not in self._files:
            if len(self._files) == MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                file = self._files[chunk.file] = open_inside(self.directory, chunk.file)
                if os.fstat(file).st_size != self.book.files[chunk.file].size:
                    raise OSError("of another size than was written")
            except OSError as error:
                raise DamagedError(f"{path}: tensor {name}: {error}") from None
        file = self._files[chunk.file]
        if chunk.file not in self._headers:
            self._headers[chunk.file] = shards.read_header(file, str(path))
        stored = self._headers[chunk.file].get(chunk.key)
        if stored is None or (stored.dtype, stored.shape) != (entry.dtype, chunk.region.shape):
            raise DamagedError(f"{path}: tensor {name}: not as the manifest describes it")
        return file, stored


def _check_fit(directory: Path, book: Manifest, tensors: Mapping[str, Tensor]) -> None:
    lines = []
    for name, tensor in tensors.items():
        entry = book.tensors.get(name)
        if entry is None:
            lines.append(f"{name}: not in the checkpoint")
            continue
        dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        if entry.shape != tuple(tensor.shape):
            lines.append(
                f"{name}: shape {list(entry.shape)} in the checkpoint, {list(tensor.shape)} here"
            )
        if entry.dtype != dtype:
            lines.append(f"{name}: dtype {entry.dtype} in the checkpoint, {dtype} here")
    _refuse(directory, lines)


def _check_all_wanted(
    ranks: Ranks, directory: Path, book: Manifest, tensors: Mapping[str, Tensor]
) -> None:
    """Refuse tensors of the checkpoint that no rank has a place for."""
    wanted = torch.tensor([name in tensors for name in book.tensors], dtype=torch.uint8)
    if ranks.size > 1 and len(wanted):
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=ranks.group)
    unused = [n for n, used in zip(book.tensors, wanted.tolist()) if not used]
    _refuse(directory, [f"{name}: only in the checkpoint" for name in unused])


def _refuse(directory: Path, lines: Sequence[str]) -> None:
    if lines:
        rest = [f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
        listed = "\n  ".join([*lines[:MAX_LISTED], *rest])
        raise MismatchError(
            f"{directory} does not fit the model ({len(lines)} differences; nothing was loaded):"
            f"\n  {listed}"
        )


def _check_files(ranks: Ranks, directory: Path, book: Manifest, *, full: bool) -> None:
    """Check this rank's share of the files: sizes, and all of the content if ``full``."""
    names = sorted(book.files, key=lambda n: book.files[n].size)[ranks.rank :: ranks.size]
    problems = checks.check_files(directory, book, names, hashes=full)
    if problems:
        listed = "; ".join(str(p) for p in problems[:MAX_LISTED])
        rest = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise DamagedError(f"{listed}{rest}")
