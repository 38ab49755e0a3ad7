"""The weights that a stage starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from shardwise import checkpoint
from shardwise.adapters.targets import is_adapter
from shardwise.checkpoint import manifest
from shardwise.checkpoint.convert import open_model
from shardwise.config.run import RunConfig
from shardwise.engines.base import Engine
from shardwise.errors import ConfigError
from shardwise.models import registry as models
from shardwise.models.common.config import DecoderConfig

HEAD = "head.weight"


def load_initial_weights(
    engine: Engine, model: DecoderConfig, source: Path | None, new_head: bool = True
) -> None:
    """The weights that a stage starts from: a checkpoint's or a folder's, or the initial ones.

    A model with a scalar head takes all but the head from one that predicts words; its head then
    keeps its (small) initial weights, unless ``new_head`` is False: a reward model's noise would
    be learnt from. Raises ConfigError for a source that holds something else.
    """
    if source is None:
        engine.start_adapter()
        return
    check_initial_weights(source, model)
    if is_native(source):
        stored = manifest.read(checkpoint.resolve(source)).tensors
        weights = {
            f"model.{name}": value for name, value in engine.held("weights") if not is_adapter(name)
        }
        head = f"model.{HEAD}"
        if model.head == "scalar" and (head not in stored or stored[head].shape[0] != 1):
            _check_head(source, new_head)
            weights.pop(head, None)
        checkpoint.load(source, weights, partial=True)
    else:
        _load_hf(source, model, engine, new_head)
    engine.start_adapter()


def check_initial_weights(source: Path, model: DecoderConfig, key: str = "init_from") -> None:
    """Raise ConfigError, naming the ``key``, if ``source`` holds another model than ``model``.

    Weights alone would not tell: those that the model lacks are not asked for, and a number of
    heads or a rotation's base leaves no trace in their shapes.
    """
    found = open_model(source).config
    assert isinstance(found, DecoderConfig)
    # How a model is trained is the recipe's to say. A vocabulary of 0 is the tokenizer's.
    free = {"max_seq_len", *(k for k in type(model).model_fields if "dropout" in k)}
    free |= {"head", "tie_embeddings"} if model.head == "scalar" else set()
    free |= {"vocab_size"} if 0 in (found.vocab_size, model.vocab_size) else set()
    theirs, ours = _said(found), _said(model)
    differ = [
        f"{k}: {theirs.get(k)} there, {ours.get(k)} here"
        for k in sorted(theirs.keys() | ours.keys())
        if k not in free and theirs.get(k) != ours.get(k)
    ]
    if differ:
        raise ConfigError(
            f"{key}: {source} holds another model ({'; '.join(differ)}); "
            "make the model section agree"
        )


def _said(model: DecoderConfig) -> dict[str, Any]:
    """A model's fields, with the values of those that follow from others."""
    fields = model.model_dump()
    for name, follows in (("head_dim", "head_width"), ("ffn_size", "ffn_width")):
        if name in fields:
            fields[name] = getattr(model, follows, fields[name])
    return fields


def _check_head(source: Path, new_head: bool) -> None:
    if not new_head:
        raise ConfigError(
            f"{source} holds a language model, no reward model; name a stage of kind reward, or a "
            "checkpoint of one"
        )


def is_native(path: Path) -> bool:
    """Whether ``path`` is a checkpoint of ours, or a folder of them."""
    return bool(checkpoint.latest(path) or (path / "manifest.json").exists())


def _load_hf(source: Path, model: DecoderConfig, engine: Engine, may_add_head: bool) -> None:
    config, tensors = models.from_hf(source)
    new_head = model.head == "scalar" and config.head != "scalar"
    if new_head:
        _check_head(source, may_add_head)
        tensors = ((name, value) for name, value in tensors if name != HEAD)
    missing = sorted(set(engine.load_weights(tensors)) - ({HEAD} if new_head else set()))
    if missing:
        raise ConfigError(f"init_from: {source} lacks {', '.join(missing[:5])}")


def initial_hash(run: RunConfig) -> str:
    """What stands for the parent of the first stage."""
    return f"seed-{run.seed}" if run.init_from is None else folder_hash(run.init_from)


def folder_hash(folder: Path | None) -> str:
    """Of the weights in a checkpoint (or the latest of a folder of them) or Hugging Face folder."""
    if folder is None:
        return ""
    book = checkpoint.latest(folder) or folder
    if (book / "manifest.json").exists():
        return manifest.read(book).digest
    total = xxhash.xxh3_128()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                total.update(block)
    return total.hexdigest()
