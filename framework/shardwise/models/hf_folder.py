"""Hugging Face folders: config.json and (sharded) safetensors, read and written as streams."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shardwise import integrity
from shardwise.config.schema import ModelConfig
from shardwise.errors import CheckpointError
from shardwise.models import text_part, travel
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.hf import from_hf_stream, to_hf_stream
from shardwise.models.common.hf_config import LABELS
from shardwise.models.config_file import read_config as read_config
from shardwise.models.config_file import read_json
from shardwise.models.families import family_of
from shardwise.models.releases import release_for, release_of
from shardwise.models.weight_files import INDEX, SINGLE, read_tensors

log = logging.getLogger(__name__)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TIED = tuple(
    f"{name}.weight" for name in ("embed_tokens", "wte", "embed_in", "lm_head", "embed_out")
)


def to_hf_tensors(
    config: ModelConfig, named: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Full tensors under Hugging Face names, from a stream under ours, one at a time."""
    assert isinstance(config, DecoderConfig)
    return to_hf_stream(family_of(config).rules(config), named, _tied(config))


def from_hf_tensors(
    config: ModelConfig, named: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors under our names, from a stream under Hugging Face's."""
    assert isinstance(config, DecoderConfig)
    family = family_of(config)
    names = family.table.names
    ignore = (*names.ignore, *([names.head] if _tied(config) else []))
    return from_hf_stream(family.rules(config), named, names.prefix, ignore)


def _tied(config: ModelConfig) -> tuple[str, ...]:
    return ("head.weight",) if getattr(config, "tie_embeddings", False) else ()


def from_hf(folder: Path | str) -> tuple[DecoderConfig, Iterator[tuple[str, Tensor]]]:
    """Config and weights (our names, stored dtype, CPU) of a Hugging Face folder.

    The iterator reads one tensor at a time. Raises CheckpointError, naming the file, when
    something is missing (MissingModelError: the whole model), unreadable or not expressible, and
    DataError for files that are not what a ``hashes.json`` beside them says; no code and no pickle
    is ever loaded.
    """
    folder = Path(folder)
    integrity.check_folder(folder)
    config = read_config(folder)
    stored = read_tensors(folder)
    if text_part.is_whole(read_json(folder / travel.CONFIG)):
        _tell(folder)
        stored = text_part.tensors(stored)
    stored = _tied_alike(folder, config, stored)
    return config, _fitting(folder / travel.CONFIG, config, from_hf_tensors(config, stored))


@functools.cache
def _tell(folder: Path) -> None:
    log.warning("%s: read is %s", folder, text_part.described(folder))


def _fitting(
    path: Path, config: DecoderConfig, named: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The stream, if every tensor has the shape that ``config`` means, and numbers as they are."""
    shapes = config.spec.shapes()
    for name, tensor in named:
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{path.parent}: {name} is stored as {tensor.dtype}: quantised weights without "
                "their scales are not read; save the model in bf16, fp16 or fp32"
            )
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{path.parent}: {name} has the shape {tuple(tensor.shape)}, and by {path.name} it "
                f"is {shapes[name]}; does the config belong to these weights?"
            )
        yield name, tensor


def _tied_alike(
    folder: Path, config: DecoderConfig, stored: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The stream, if a stored head is the embedding that the config ties it to."""
    ends: list[Tensor] = []
    for name, tensor in stored:
        if config.tie_embeddings and name.endswith(_TIED):
            ends.append(tensor)
        if len(ends) == 2 and not torch.equal(*ends):
            raise CheckpointError(
                f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but "
                "both are stored and differ; set it to false"
            )
        yield name, tensor


def to_hf(
    folder: Path | str,
    config: ModelConfig,
    named: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
    carried: Mapping[str, bytes] | None = None,
    stop_ids: Sequence[int] = (),
    named_ids: Mapping[str, int] | None = None,
) -> None:
    """Write a folder that transformers loads.

    ``named`` are full tensors under our names, converted to ``dtype`` if given. A file holds at
    most ``max_shard_size`` bytes of tensors, or one tensor. ``carried`` are files that came with
    the model (`travel`): its config.json and generation_config.json go on, but for what ``config``
    says otherwise and for ``stop_ids``, after which generation ends too. ``named_ids`` (of "eos",
    "bos", "pad") serve where the files say nothing. config.json is written last, so a folder that
    has it is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    carried = carried or {}
    raw = _config_json(config, travel.parse(carried, travel.CONFIG))
    tokens = {f"{kind}_token_id": token for kind, token in (named_ids or {}).items()}
    for stale in (folder / travel.CONFIG, folder / INDEX, *folder.glob("model*.safetensors")):
        stale.unlink(missing_ok=True)
    stored = _write_shards(folder, to_hf_tensors(config, named), dtype, max_shard_size)
    ends = list(dict.fromkeys([*travel.end_ids(carried), *stop_ids]))
    said = tokens | travel.generation(carried)
    if len(ends) > len(travel.end_ids(carried)):
        said["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if said:
        _write_json(folder / travel.GENERATION, said)
    # An absent one would fall back to the class's own, which may be outside the vocabulary.
    raw = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | tokens | raw
    raw |= {"dtype" if "dtype" in raw else "torch_dtype": stored}
    _write_json(folder / travel.CONFIG, raw)


def write_config(folder: Path, config: ModelConfig, carried: Mapping[str, bytes]) -> None:
    """Write config.json alone, as `to_hf` does."""
    _write_json(folder / travel.CONFIG, _config_json(config, travel.parse(carried, travel.CONFIG)))


def _config_json(config: ModelConfig, carried: dict[str, Any]) -> dict[str, Any]:
    """What ``carried`` says, but for what ``config`` says otherwise."""
    assert isinstance(config, DecoderConfig)
    own = release_of(carried.get("model_type"))
    if own is None or own not in family_of(config).table.releases:
        return release_for(config).write(config)
    before = own.read(carried)
    if before == config:
        return {"architectures": [own.name + own.decoder]} | carried
    release = release_for(config, own)
    made, words = release.write(config), own.words | release.words
    kept = {k: v for k, v in carried.items() if k not in made and k not in words}
    for key in LABELS:  # names of scores
        if before.head != config.head:
            kept.pop(key, None)
        elif key in carried:
            made[key] = carried[key]
    return kept | made


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes(travel.dump(value))


def _write_shards(
    folder: Path, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, limit: int
) -> str:
    """Write the weight files and their index; returns the name of the first tensor's dtype."""
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = size = 0
    stored = "float32"

    def flush() -> None:
        if waiting:
            path = folder / f"model-{len(shards) + 1:05d}.safetensors"
            save_file(waiting, path, metadata={"format": "pt"})
            shards.append(list(waiting))
            waiting.clear()

    for name, tensor in named:
        value = tensor.detach().to("cpu", dtype).contiguous()
        stored = str(value.dtype).removeprefix("torch.")
        if size + value.nbytes > limit:
            flush()
            size = 0
        waiting[name] = value
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "model-00001.safetensors").rename(folder / SINGLE)
        return stored
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"model-{i:05d}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return stored
