"""What a checkpoint holds, told without torch: `inspect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from shardwise.checkpoint import manifest, steps


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
