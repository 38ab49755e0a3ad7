"""A reference's log-probabilities, computed once and kept beside the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from shardwise.parallel.collectives import gather_json
from shardwise.safe_files import read_bytes
from shardwise.stages.base import StageContext
from shardwise.storage.durable import make_folder, write_durably

FOLDER = "reference"
_NAME = "logprobs"


def stored_logprobs(
    ctx: StageContext,
    data_hash: str,
    sizes: Sequence[int],
    ask: Callable[[], list[list[np.ndarray]]],
) -> list[np.ndarray]:
    """Log-probabilities of answers of ``sizes`` tokens, flat; a collective call.

    From RUN/reference, under a hash of ``data_hash`` (rows and the reference's weights), the stage
    and its precision; if no sound file is there, ``ask`` is called, on every rank, and what it says
    is kept: fp32 numbers, or fp64 where the stage computes in it.
    """
    key = xxhash.xxh3_128_hexdigest(repr([data_hash, ctx.precision]).encode())
    path = ctx.directory / FOLDER / f"{ctx.stage.name}-{key}.safetensors"
    total = int(sum(sizes))
    flat = _read(path, total)
    assert dist.group.WORLD is not None
    if not all(gather_json(flat is not None, dist.group.WORLD)):
        said = [value for of_row in ask() for value in of_row]
        flat = np.concatenate(said).astype(ctx.wide)
        if ctx.is_main:
            make_folder(path.parent)
            write_durably(path, _sealed(flat))
        dist.barrier()
    assert flat is not None and len(flat) == total
    return np.split(flat, np.cumsum(sizes)[:-1])


def _sealed(flat: np.ndarray) -> bytes:
    """A safetensors file behind the xxh3-128 of its bytes."""
    body = safetensors.save({_NAME: flat})
    return xxhash.xxh3_128_digest(body) + body


def _read(path: Path, total: int) -> np.ndarray | None:
    """What a file holds; None if there is none, or it is not what was written."""
    if not path.is_file():
        return None
    data = read_bytes(path, path.stat().st_size)
    seal, body = data[:16], data[16:]
    if xxhash.xxh3_128_digest(body) != seal:
        return None
    try:
        flat = safetensors.load(body)[_NAME]
    except (SafetensorError, KeyError):
        return None
    return flat if flat.shape == (total,) else None
