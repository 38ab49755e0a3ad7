"""Checkpoints that hold an adapter and say which model it belongs to, but not that model.

``adapter.json`` beside the tensors names the base: a checkpoint, a Hugging Face folder or a GGUF
file with the hash of its weights, or the seed that its initial weights came from. What is opened is
the whole model, the adapter merged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from shardwise.adapters.quantise import read_back
from shardwise.adapters.registry import build_adapter
from shardwise.adapters.targets import MARK, is_adapter
from shardwise.checkpoint import loading, manifest, steps
from shardwise.config import registry as configs
from shardwise.config.adapters import AdapterConfig
from shardwise.errors import UserError
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.init import init_weights

ADAPTER_FILE = "adapter.json"


def weights_hash(path: Path) -> str:
    """Of a checkpoint (or the latest of a folder of them), a Hugging Face folder or a GGUF file."""
    book = steps.latest(path) or path
    if (book / manifest.NAME).exists():
        return manifest.read(book).digest
    total = xxhash.xxh3_128()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def description(adapter: AdapterConfig, base: Path | None, seed: int, root: Path) -> bytes:
    """The ``adapter.json`` of a checkpoint under ``root``; no base: initial weights of a seed."""
    said: dict[str, Any] = {"seed": seed}
    if base is not None:
        found = (steps.latest(base) or base).absolute()
        said = {
            "path": str(found),
            # A run's folder may move as a whole.
            "relative": os.path.relpath(found, (root / "step").absolute()),
            "hash": weights_hash(found),
        }
    return json.dumps({"adapter": adapter.model_dump(mode="json"), "base": said}).encode()


def read(files: Mapping[str, bytes]) -> tuple[AdapterConfig, dict[str, Any]] | None:
    """The adapter of a checkpoint with these files, and what is said of its base; None: a model."""
    if ADAPTER_FILE not in files:
        return None
    said = json.loads(files[ADAPTER_FILE])
    configs.discover()
    table = configs.ADAPTER_CONFIGS
    if (kind := said["adapter"]["kind"]) not in table:
        raise UserError(f"{ADAPTER_FILE}: unknown kind {kind!r}; known: {', '.join(sorted(table))}")
    text = json.dumps(said["adapter"])
    return table[kind].model_validate_json(text, strict=True), said["base"]


def base_of(path: Path, base: Mapping[str, Any]) -> Path | None:
    """Where the base of the checkpoint ``path`` lies; None: it is a seed's.

    Raises UserError if it is gone or another one.
    """
    if "path" not in base:
        return None
    for place in (path.absolute() / base["relative"], Path(base["path"])):
        if place.exists():
            if (found := weights_hash(place)) != base["hash"]:
                raise UserError(
                    f"{path}: its adapter belongs to other weights than those in {place} (hash "
                    f"{found}, trained on {base['hash']}); put back what it was trained on"
                )
            return Path(os.path.normpath(place))
    raise UserError(
        f"{path}: holds an adapter, and its base {base['path']} is gone; put it there again "
        f"(weights of hash {base['hash']})"
    )


def merged(
    path: Path, model: DecoderConfig, config: AdapterConfig, base: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the whole model: those of ``base`` with the adapter of ``path`` in them.

    Of one that cannot be merged, base and adapter, one behind the other.
    """
    own, adapter = own_tensors(path), build_adapter(config, model)
    if config.quantise is not None:
        base = read_back(base, config.quantise, model)
    if config.merges:
        yield from adapter.merge(beside(base, own))
        return
    yield from ((name, own.get(name, tensor)) for name, tensor in base)
    yield from ((name, tensor) for name, tensor in own.items() if is_adapter(name))


def own_tensors(path: Path) -> dict[str, Tensor]:
    """The adapter's own tensors (and a new head), by their names in the model."""
    prefix = "model."
    found = loading.read_tensors(path, lambda n: n.startswith(prefix))
    return {name.removeprefix(prefix): tensor for name, tensor in found}


def beside(
    base: Iterator[tuple[str, Tensor]], own: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors with those of its adapter, each behind the weight that it adapts."""
    of_module: dict[str, list[str]] = {}
    for name in filter(is_adapter, own):
        of_module.setdefault(name.partition(f".{MARK}.")[0], []).append(name)
    for name, tensor in base:
        yield name, own.get(name, tensor)
        for part in of_module.get(name.removesuffix(".weight"), ()):
            yield part, own[part]


def initial_tensors(model: DecoderConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The initial weights of a model, as every layout has them."""
    with torch.device("cpu"):
        whole = registry.build(model)
    init_weights(whole, seed)
    for name, parameter in whole.named_parameters():
        yield name, parameter.data
