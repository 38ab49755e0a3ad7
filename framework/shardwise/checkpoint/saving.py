"""Saving: plan together, write alone, commit once. Synchronous, or behind the training loop."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

import shardwise
from shardwise.checkpoint import manifest, plan, steps
from shardwise.checkpoint.manifest import BLOCK_BYTES, Chunk, FileEntry, Manifest, TensorEntry
from shardwise.checkpoint.ranks import Ranks
from shardwise.checkpoint.writer import Writer
from shardwise.errors import CheckpointError
from shardwise.ops.local_shards import LocalShard
from shardwise.ops.regions import Region

log = logging.getLogger(__name__)

Table = dict[str, tuple[str, tuple[int, ...]]]  # dtype and global shape by name
MAX_SHARD_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Part:
    """One region that this rank writes."""

    name: str
    region: Region
    key: str
    values: Tensor
    finite: bool = True  # whether it must be


@dataclasses.dataclass(frozen=True)
class Request:
    """What to save besides the tensors, and what to do once it is durable."""

    root: Path
    step: int
    meta: Mapping[str, Any]
    files: Mapping[str, bytes]
    keep: int | None
    protect: Collection[int]
    metric: float | None
    lower_is_better: bool
    nonfinite: Collection[str] = ()


def save(
    root: Path | str,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    *,
    keep: int | None = None,
    protect: Collection[int] = (),
    metric: float | None = None,
    lower_is_better: bool = True,
    nonfinite: Collection[str] = (),
    group: dist.ProcessGroup | None = None,
    writer: Writer | None = None,
) -> Path:
    """Write ``root/step_00000100`` and return once it is durable; a collective call.

    Args:
        root: folder of the checkpoints, on storage that all ranks share.
        step: names the checkpoint; an existing one of this step is replaced.
        tensors: by name; DTensors of any placement, or plain tensors, which must be equal
            wherever they appear. Ranks may hold different names (pipeline parallel).
        meta: all else, as JSON; rank 0's is stored. ``files``: small files, likewise.
        keep: remove older checkpoints beyond this many, except the best and ``protect``.
        metric: marks the checkpoint as the best if it improves on the best so far.
        nonfinite: names of tensors that may hold NaN and infinities: what was observed rather
            than computed with, or a mask. Everywhere else such a value is refused.
        group: ranks that take part; by default all.

    Raises CheckpointError, on every rank and naming the rank at fault. Then nothing of the new
    checkpoint remains and the older ones are untouched. Training may go on, unless the error is a
    NonFiniteError (it names tensor and value) or a PeerLostError. Once it is committed,
    a pointer that cannot be written or an older checkpoint that cannot be removed is a warning.
    """
    ranks = Ranks.of(group)
    metric = None if metric is None else float(metric)
    request = Request(
        Path(root), step, meta, files or {}, keep, protect, metric, lower_is_better, nonfinite
    )
    planner = Planner()
    parts = planner.parts(ranks, request, tensors)
    return write(ranks, writer or Writer(), request, parts, planner.table)


class Planner:
    """Agrees with the other ranks who writes what; remembers the answer while nothing changes."""

    def __init__(self) -> None:
        self._held = ""
        self._mine: list[tuple[int, int]] = []
        self.table: Table = {}  # of all ranks' tensors; on rank 0 only

    def parts(self, ranks: Ranks, request: Request, tensors: Mapping[str, Tensor]) -> list[Part]:
        """The parts that this rank writes, still in the tensors' own memory."""
        held: list[plan.Holding] = []
        memory: list[list[LocalShard]] = []
        with ranks.together():
            _check_request(request)
            held, memory = plan.holdings(tensors)
        document = [h.to_json() for h in held]
        digest = xxhash.xxh3_128_hexdigest(json.dumps(document).encode())
        answers = ranks.exchange([request.step, digest == self._held])
        if len({step for step, _ in answers}) > 1:
            raise CheckpointError(f"the ranks save different steps: {[a[0] for a in answers]}")
        if not all(same for _, same in answers):
            self._mine = self._agree(ranks, document)
            self._held = digest
        parts = []
        for index, number in self._mine:
            holding, shard = held[index], memory[index][number]
            single = len(memory[index]) == 1
            key = holding.name if single else f"{holding.name}@{list(shard.region.offset)}"
            finite = holding.name not in request.nonfinite
            parts.append(Part(holding.name, shard.region, key, shard.view, finite))
        return parts

    def _agree(self, ranks: Ranks, document: list[list[Any]]) -> list[tuple[int, int]]:
        by_rank = ranks.collect(document)
        assigned: list[list[tuple[int, int]]] = []
        with ranks.together():
            if ranks.rank == 0:
                held = [[plan.holding_from_json(h) for h in r] for r in by_rank]
                assigned = plan.assign(held)
                self.table = {h.name: (h.dtype, h.shape) for rank in held for h in rank}
        return [(index, number) for index, number in ranks.deal(assigned)]


def _check_request(request: Request) -> None:
    steps.directory_name(request.step)
    if request.keep is not None and request.keep < 1:
        raise CheckpointError(f"keep={request.keep}: at least one checkpoint must be kept")
    _check_json(dict(request.meta), "meta")
    for name, data in request.files.items():
        manifest.check_file_name(name)
        if name == manifest.NAME or name.startswith("shard-"):
            raise CheckpointError(f"{name!r} is a name that the checkpoint itself uses")
        if not isinstance(data, bytes):
            raise CheckpointError(f"file {name!r}: is a {type(data).__name__}, not bytes")


def _check_json(value: Any, where: str) -> None:
    """Raise CheckpointError for what JSON would refuse or change on the way."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: the key {key!r} is not a string")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise CheckpointError(f"{where}: a {type(value).__name__} is not JSON")
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{where}: {value} is not JSON; store it as a string or null")


def write(ranks: Ranks, writer: Writer, request: Request, parts: list[Part], table: Table) -> Path:
    """All phases that touch the disk; on an error nothing of the new checkpoint remains."""
    staged: Path | None = None
    written: dict[str, Any] = {}
    try:
        with ranks.together():
            if ranks.rank == 0:
                staged = writer.stage(request.root, request.step)
        directory = Path(ranks.share(str(staged)))
        with ranks.together():
            written = _write_shards(writer, directory, ranks.rank, parts)
        by_rank = ranks.collect(written)
        with ranks.together():
            if ranks.rank == 0:
                _commit(writer, request, directory, table, by_rank)
    except BaseException:
        if staged is not None:
            writer.discard(staged)
        raise
    return request.root / steps.directory_name(request.step)


def _write_shards(writer: Writer, directory: Path, rank: int, parts: list[Part]) -> dict[str, Any]:
    """Write this rank's files, each of about MAX_SHARD_BYTES at most; returns what they hold."""
    files: dict[str, Any] = {}
    chunks: list[Any] = []
    groups: list[list[Part]] = []
    size = 0
    for part in parts:
        num_bytes = part.values.numel() * part.values.element_size()
        if not groups or size + num_bytes > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += num_bytes
    for index, group in enumerate(groups):
        name = f"shard-{rank:05d}-{index:03d}.safetensors"
        tensors = [(p.key, p.values) for p in group]
        free = {p.key for p in group if not p.finite}
        entry, hashes = writer.shard(directory, name, index, tensors, free)
        files[name] = [entry.size, entry.xxh3_128]
        chunks += [
            [p.name, p.region.offset, p.region.shape, name, p.key, h] for p, h in zip(group, hashes)
        ]
    return {"files": files, "chunks": chunks}


def _commit(
    writer: Writer, request: Request, staged: Path, table: Table, by_rank: list[dict[str, Any]]
) -> None:
    """Rank 0, once every rank's files are durable: manifest, rename, pointers, prune."""
    files = writer.extras(staged, request.files)
    chunks: dict[str, list[Chunk]] = {name: [] for name in table}
    for written in by_rank:
        files.update({name: FileEntry(*entry) for name, entry in written["files"].items()})
        for name, offset, shape, file, key, hashes in written["chunks"]:
            region = Region(tuple(offset), tuple(shape))
            chunks[name].append(Chunk(region, file, key, tuple(hashes)))
    for name, entry in files.items():
        if not (staged / name).is_file() or (staged / name).stat().st_size != entry.size:
            raise CheckpointError(
                f"{staged / name}: not what its rank wrote; do all ranks share this storage?"
            )
    latest = steps.read_pointer(request.root, steps.LATEST)
    best = steps.read_pointer(request.root, steps.BEST)
    data = manifest.seal(
        Manifest(
            step=request.step,
            tensors={n: TensorEntry(*table[n], tuple(chunks[n])) for n in table},
            files=files,
            block_bytes=BLOCK_BYTES,
            meta=dict(request.meta),
            versions={
                "shardwise": shardwise.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            previous=latest["manifest"] if latest else "",
        ).to_json()
    )
    writer.manifest(staged, data)
    writer.rename(staged, request.root / steps.directory_name(request.step))
    try:
        fields = {"step": request.step, "manifest": manifest.digest_of(data)}
        if _improves(request, best):
            writer.pointer(request.root, steps.BEST, {**fields, "metric": request.metric})
        writer.pointer(request.root, steps.LATEST, fields)
        if request.keep is not None:
            writer.prune(request.root, request.keep, request.protect)
    except (CheckpointError, OSError) as error:
        # The checkpoint exists, and is found without its pointer; the next save tries again.
        log.warning("step %d is saved, but not all that follows: %s", request.step, error)


def _improves(request: Request, best: dict[str, Any] | None) -> bool:
    if request.metric is None or not math.isfinite(request.metric):
        return False
    if best is None or best["step"] == request.step or "metric" not in best:
        return True
    gain = float(request.metric - best["metric"])
    return gain < 0 if request.lower_is_better else gain > 0


def mark_best(root: Path | str, step: int, metric: float, lower_is_better: bool = True) -> bool:
    """Point ``best.json`` to a committed step if ``metric`` improves; call it on one rank.

    For a metric that is known only after the save. Returns whether the pointer moved.
    """
    root = Path(root)
    directory = steps.committed(root).get(step)
    if directory is None:
        raise CheckpointError(f"{root}: step {step} is not a checkpoint; it cannot be the best")
    request = Request(root, step, {}, {}, None, (), metric, lower_is_better)
    if not _improves(request, steps.read_pointer(root, steps.BEST)):
        return False
    fields = {"step": step, "manifest": manifest.read(directory).digest, "metric": metric}
    Writer().pointer(root, steps.BEST, fields)
    return True


def prune(
    root: Path | str, keep: int, protect: Collection[int] = (), *, writer: Writer | None = None
) -> list[Path]:
    """Remove all but the ``keep`` newest checkpoints; call it on one rank.

    The latest, the best and the steps in ``protect`` stay. Returns the directories removed.
    """
    return (writer or Writer()).prune(Path(root), keep, protect)
