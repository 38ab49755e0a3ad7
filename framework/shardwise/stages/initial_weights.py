"""The weights that a stage starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwise import checkpoint, hub
from shardwise.adapters.config import LowRankConfig
from shardwise.adapters.peft_read import is_adapter_folder
from shardwise.adapters.targets import is_adapter, targets
from shardwise.checkpoint import adapted, manifest
from shardwise.checkpoint.convert import OpenModel, open_model, own_adapter, peft_base
from shardwise.checkpoint.shards import DTYPES
from shardwise.config.adapters import AdapterConfig
from shardwise.config.run import RunConfig
from shardwise.engines.base import Engine
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig

HEAD = "head.weight"


def load_initial_weights(
    engine: Engine,
    model: DecoderConfig,
    source: Path | None,
    new_head: bool = True,
) -> None:
    """The weights that a stage starts from: a checkpoint's or a folder's, or the initial ones.

    An adapter of the engine's starts anew, or as the one that ``source`` holds.

    A model with a scalar head takes all but the head from one that predicts words; its head then
    keeps its (small) initial weights, unless ``new_head`` is False: a reward model's noise would
    be learnt from. Raises ConfigError for a source that holds something else.
    """
    adapter = engine.adapter_config
    if adapter is not None and adapter.start == "parent":
        if source is not None and is_adapter_folder(source):
            base_model = peft_base(source)
            config, own = own_adapter(source, base_model)
            # A file of PEFT's does not say in how many bits its base was.
            like = config.model_copy(update={"quantise": adapter.quantise})
            _check_alike(source, model, like, adapter)
            _load_base(engine, model, base_model, new_head)
            engine.load_weights(own.items())
            return
        path, base = _adapted_base(source, model, adapter)
        if (place := adapted.base_of(path, base)) is not None:
            _load_base(engine, model, place, new_head)
        else:
            engine.load_weights(adapted.initial_tensors(model, int(base["seed"])))
        stored = manifest.read(path).tensors
        held = {f"model.{name}": value for name, value in engine.held("weights")}
        checkpoint.load(path, {n: v for n, v in held.items() if n in stored}, partial=True)
        return
    if source is not None:
        _load_base(engine, model, source, new_head)
    engine.start_adapter()


def _load_base(engine: Engine, model: DecoderConfig, source: Path, new_head: bool) -> None:
    check_initial_weights(source, model)
    opened = open_model(source)
    whole = is_native(source) and not _fits_in_place(engine, source)
    if opened.adapter is not None or opened.format == "peft" or whole:
        tensors = opened.tensors
        if model.head == "scalar":
            _check_head(source, new_head)
            tensors = ((name, value) for name, value in tensors if name != HEAD)
        engine.load_weights(tensors)
    elif is_native(source):
        stored = manifest.read(checkpoint.resolve(source)).tensors
        held = engine.held("weights")
        weights = {f"model.{name}": value for name, value in held if not is_adapter(name)}
        head = f"model.{HEAD}"
        if model.head == "scalar" and (head not in stored or stored[head].shape[0] != 1):
            _check_head(source, new_head)
            weights.pop(head, None)
        checkpoint.load(source, weights, partial=True)
    else:
        _load_foreign(opened, source, model, engine, new_head)


def _fits_in_place(engine: Engine, source: Path) -> bool:
    """Whether what is stored is what the engine keeps.

    A quantised weight is made of a whole one; a role that stands still may be kept in 16 bits.
    """
    adapter = engine.adapter_config
    if adapter is not None and adapter.quantise is not None:
        return False
    stored = manifest.read(checkpoint.resolve(source)).tensors
    kept = ((stored.get(f"model.{name}"), value) for name, value in engine.held("weights"))
    return all(there is None or DTYPES[there.dtype] == value.dtype for there, value in kept)


def _adapted_base(
    source: Path | None, model: DecoderConfig, adapter: AdapterConfig
) -> tuple[Path, dict[str, Any]]:
    """A checkpoint with an adapter like the one that is wanted, and what is said of its base."""
    path, found = Path(), None
    if source is not None and is_native(source):
        path = checkpoint.resolve(source)
        found = adapted.read(checkpoint.read_files(path))
    if found is None:
        raise ConfigError(
            f"adapter.start: parent, but {source or 'a fresh model'} holds no adapter to go on "
            "with; write new, or start from a checkpoint of a stage with an adapter"
        )
    _check_alike(path, model, found[0], adapter)
    return path, found[1]


def _check_alike(
    source: Path, model: DecoderConfig, there: AdapterConfig, here: AdapterConfig
) -> None:
    theirs, ours = (_settings(adapter, model) for adapter in (there, here))
    keys = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    if differ := [f"{k}: {theirs.get(k)} there, {ours.get(k)} here" for k in keys]:
        raise ConfigError(
            f"adapter.start: parent, but {source} holds another adapter "
            f"({'; '.join(differ[:3])}); make the adapter section agree, or write new"
        )


def _settings(adapter: AdapterConfig, model: DecoderConfig) -> dict[str, Any]:
    """All that must agree of an adapter; of a low-rank one, by module."""
    said = adapter.model_dump(exclude={"start", "dropout", "lr_ratio", "preset"})
    if isinstance(adapter, LowRankConfig):
        for key in ("rank", "alpha", "targets", "rank_pattern", "alpha_pattern"):
            del said[key]
        for target in targets(model, adapter):
            own = adapter.of(target.path)
            said[target.path] = f"rank {own.rank}, alpha {own.alpha:g}"
    return said


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
            "make the model section agree, or leave out what init_from says itself"
        )


def _said(model: DecoderConfig) -> dict[str, Any]:
    """A model's fields, with the values of those that follow from others."""
    fields = model.model_dump()
    for name, follows in (("head_dim", "head_width"), ("ffn_size", "ffn_width")):
        if name in fields:
            fields[name] = getattr(model, follows)
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


def _load_foreign(
    opened: OpenModel, source: Path, model: DecoderConfig, engine: Engine, may_add_head: bool
) -> None:
    """A Hugging Face folder's or a GGUF file's."""
    config, tensors = opened.config, opened.tensors
    assert isinstance(config, DecoderConfig)
    new_head = model.head == "scalar" and config.head != "scalar"
    if new_head:
        _check_head(source, may_add_head)
        tensors = ((name, value) for name, value in tensors if name != HEAD)
    missing = sorted(set(engine.load_weights(tensors)) - ({HEAD} if new_head else set()))
    if missing:
        raise ConfigError(f"init_from: {source} lacks {', '.join(missing[:5])}")


def initial_hash(run: RunConfig) -> str:
    """What stands for the parent of the first stage: weights, and their commit on the hub."""
    if run.init_from is None:
        return f"seed-{run.seed}"
    own = folder_hash(run.start) + (hub.revision_of(run.init_from, "model") or "")
    return f"{own}+optimizer" if run.init_optimizer else own


def folder_hash(folder: Path | None) -> str:
    """See `checkpoint.adapted.weights_hash`; empty for no folder. An adapter's and its base's."""
    if folder is None:
        return ""
    base = adapted.weights_hash(peft_base(folder)) if is_adapter_folder(folder) else ""
    return adapted.weights_hash(folder) + base
