"""Which modules of a model an adapter is for, and which of its parameters a stage trains."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from shardwise.adapters.config import LowRankConfig, names_module
from shardwise.adapters.presets import ALL_LINEAR
from shardwise.config.adapters import FreezeConfig
from shardwise.errors import ConfigError
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder

MARK = "adapter"  # the module below which an adapter's parameters stand


@dataclasses.dataclass(frozen=True)
class Target:
    """A module to adapt: its weight is ``rows x columns`` (an embedding's: tokens x features)."""

    path: str
    rows: int
    columns: int
    embeds: bool


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return f".{MARK}." in name


def stand_still(model: Decoder) -> None:
    """Train nothing of a part of a model but a scalar head, which no pre-training made."""
    model.requires_grad_(False)
    if model.config.head == "scalar" and model.head is not None:
        model.head.requires_grad_(True)


def targets(model: DecoderConfig, config: LowRankConfig) -> list[Target]:
    """The modules that the patterns of ``targets`` name, in the model's order.

    Raises ConfigError, naming the key, for a pattern that names none, for a rank beyond a matrix,
    and for what cannot be adapted by itself.
    """
    found: dict[str, Target] = {}
    modules = dict(_matrices(model))
    for pattern in config.targets:
        named = [path for path in modules if _matches(path, pattern)]
        if not named:
            raise ConfigError(
                f"adapter.targets: {pattern!r} names no linear layer and no embedding of this "
                f"{model.family} model; there are {', '.join(_shapes(modules))}"
            )
        for path in named:
            found[path] = modules[path]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(names_module(pattern, path) for path in found):
                raise ConfigError(
                    f"adapter.{key}: {pattern!r} names no module of adapter.targets; there are "
                    f"{', '.join(_shapes(found))}"
                )
    for target in found.values():
        _check(target, model, config)
    return [modules[path] for path in modules if path in found]


def _check(target: Target, model: DecoderConfig, config: LowRankConfig) -> None:
    least, config = min(target.rows, target.columns), config.of(target.path)
    if config.rank > least:
        raise ConfigError(
            f"adapter.rank: {config.rank} is beyond {target.path}, a matrix of {target.rows} x "
            f"{target.columns}; give at most {least}, or leave it out of adapter.targets"
        )
    if target.path in ("embed", "head") and model.tie_embeddings:
        raise ConfigError(
            f"adapter.targets: {target.path} shares its weight (model.tie_embeddings), and an "
            "adapter of one of the two could not be merged; leave it out, or use an untied model"
        )
    if target.embeds and (config.magnitudes or config.init != "default"):
        raise ConfigError(
            f"adapter.targets: {target.path} is an embedding, which has neither DoRA's magnitudes "
            f"nor adapter.init {config.init}; use kind lora with init default, or leave it out"
        )


def trained_names(model: DecoderConfig, freeze: FreezeConfig) -> frozenset[str]:
    """The parameters that ``freeze`` leaves to be trained.

    Raises ConfigError for a pattern that names nothing, for more layers than there are, and if
    nothing is left.
    """
    names = registry.parameter_names(model)
    frozen: set[str] = set()
    for pattern in freeze.patterns:
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(
                f"freeze.patterns: {pattern!r} names no parameter of this {model.family} model; "
                f"there are {', '.join(_without_numbers(names))}"
            )
        frozen.update(matching)
    last = freeze.train_last
    if last is not None:
        if last > model.num_layers:
            raise ConfigError(
                f"freeze.train_last: {last} layers, and the model has {model.num_layers}; give "
                "fewer"
            )
        frozen.update(name for name in names if _stands_before(name, model, last))
    if frozen >= set(names):
        raise ConfigError("freeze: leaves no parameter to train; name fewer")
    return frozenset(set(names) - frozen)


def _stands_before(name: str, model: DecoderConfig, last: int) -> bool:
    """Whether a parameter is in front of the ``last`` layers (a tied embedding is)."""
    first, _, rest = name.partition(".")
    if first == "layers":
        return int(rest.partition(".")[0]) < model.num_layers - last
    return first not in Decoder.exit


def _matches(path: str, pattern: str) -> bool:
    return path.startswith("layers.") if pattern == ALL_LINEAR else names_module(pattern, path)


def _matrices(model: DecoderConfig) -> Iterator[tuple[str, Target]]:
    with torch.device("meta"):
        whole = registry.build(_sized(model))
    for path, module in whole.named_modules():
        if isinstance(module, nn.Linear):
            yield path, Target(path, module.out_features, module.in_features, embeds=False)
        elif isinstance(module, nn.Embedding):
            yield path, Target(path, module.num_embeddings, module.embedding_dim, embeds=True)


def _sized(model: DecoderConfig) -> DecoderConfig:
    """A recipe may leave the vocabulary to the tokenizer."""
    return model.model_copy(update={"vocab_size": model.vocab_size or 1 << 16})


def _shapes(paths: Sequence[str] | dict[str, Target]) -> list[str]:
    return _without_numbers(list(paths))


def _without_numbers(names: Sequence[str]) -> list[str]:
    """``layers.*.attn.q`` once for all layers."""
    parts = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join("*" if p.isdigit() else p for p in own) for own in parts))
