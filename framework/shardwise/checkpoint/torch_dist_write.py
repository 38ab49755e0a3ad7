"""Megatron-core's ``torch_dist``, written: tensors by layer, as they come, in one file.

What describes them is written by PyTorch's DCP itself. Nothing here reads a pickle.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from shardwise.checkpoint.pickles.write import archived
from shardwise.checkpoint.pickles.write import write as write_archive
from shardwise.checkpoint.torch_dist import COMMON, FORMAT, POINTER

DATA = "__0_0.distcp"
# Megatron-LM's name of a checkpoint that is a start: of weights, at iteration 0.
TAG = "release"


@dataclasses.dataclass(frozen=True)
class Part:
    """A whole tensor; or of ``num_layers``, stacked on the first axis, that of ``layer``."""

    name: str
    tensor: Tensor
    layer: int | None = None
    num_layers: int = 0


def write(out: Path, parts: Iterable[Part], objects: Iterable[str]) -> None:
    """Fill a folder as Megatron-LM's ``--load`` takes it; one tensor is in memory at a time.

    ``objects``: names that its modules ask for besides, which hold nothing.
    """
    folder = out / TAG
    folder.mkdir(parents=True)
    tensors: dict[str, Any] = {}
    stored: list[WriteResult] = []

    def put(index: dcp.MetadataIndex, value: Any) -> None:
        start, data = file.tell(), archived(value, "archive")
        file.write(data)
        where = _StorageInfo(DATA, start, len(data))
        stored.append(WriteResult(index, len(data), where))

    with (folder / DATA).open("xb") as file:
        for part in parts:
            value, offsets = part.tensor.detach().contiguous(), (0,) * part.tensor.dim()
            size = tuple(value.shape)
            if part.layer is not None:
                value, offsets = value[None], (part.layer, *offsets)
                size = (part.num_layers, *size)
            about = tensors.setdefault(
                part.name,
                dcp.TensorStorageMetadata(
                    dcp.TensorProperties(dtype=value.dtype), torch.Size(size), []
                ),
            )
            about.chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), value.shape))
            put(dcp.MetadataIndex(part.name, offsets), value)
        for name in objects:
            tensors[name] = dcp.BytesStorageMetadata()
            put(dcp.MetadataIndex(name), [None])
    FileSystemWriter(folder).finish(dcp.Metadata(tensors), [stored])
    # Version 3: queries, keys and values of a head side by side. Without it they are reordered.
    write_archive(folder / COMMON, {"checkpoint_version": 3.0, "iteration": 0})
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}  # type: ignore[dict-item]
    (folder / FORMAT).write_text(json.dumps(backends))
    (out / POINTER).write_text(TAG)
