"""The weights that a stage starts from."""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from shardwise import checkpoint
from shardwise.checkpoint import manifest
from shardwise.config.schema import RunConfig
from shardwise.engines.base import Engine
from shardwise.errors import ConfigError
from shardwise.models import registry as models


def load_start(engine: Engine, run: RunConfig, parent: Path | None) -> None:
    """The weights that a stage starts from: its parent's, ``init_from``'s, or the initial ones."""
    weights = {n: t for n, t in engine.state_dict().tensors.items() if n.startswith("model.")}
    if parent is not None:
        checkpoint.load(parent, weights, partial=True)
    elif run.init_from is not None:
        if checkpoint.latest(run.init_from) or (run.init_from / "manifest.json").exists():
            checkpoint.load(run.init_from, weights, partial=True)
        else:
            _load_hf(run, weights)


def _load_hf(run: RunConfig, weights: dict[str, Tensor]) -> None:
    assert run.init_from is not None
    config, tensors = models.from_hf(run.init_from)
    wanted = run.model.model_dump(exclude={"max_seq_len"})
    found = config.model_dump(exclude={"max_seq_len"})
    differ = [
        f"{k}: {found.get(k)} there, {wanted[k]} here" for k in wanted if wanted[k] != found.get(k)
    ]
    if differ:
        raise ConfigError(
            f"init_from: {run.init_from} holds another model ({'; '.join(differ)}); "
            "make the model section agree"
        )
    seen: set[str] = set()
    for name, value in tensors:
        copy_full(weights[f"model.{name}"], value)
        seen.add(f"model.{name}")
    if missing := sorted(weights.keys() - seen):
        raise ConfigError(f"init_from: {run.init_from} lacks {', '.join(missing[:5])}")


def copy_full(target: Tensor, full: Tensor) -> None:
    """Write a whole tensor, present on every rank, into a tensor of any placement."""
    with torch.no_grad():
        full = full.to(device=target.device, dtype=target.dtype)
        if isinstance(target, DTensor):
            full = distribute_tensor(
                full, target.device_mesh, target.placements, src_data_rank=None
            )
        target.copy_(full)


def start_hash(run: RunConfig) -> str:
    """What stands for the parent of the first stage."""
    if run.init_from is None:
        return f"seed-{run.seed}"
    book = checkpoint.latest(run.init_from) or run.init_from
    if (book / "manifest.json").exists():
        return manifest.read(book).digest
    total = xxhash.xxh3_128()
    for file in sorted(run.init_from.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                total.update(block)
    return total.hexdigest()
