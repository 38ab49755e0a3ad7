"""The models room's front door: families by name, building, import and export."""

from __future__ import annotations

from shardwise.config.schema import ModelConfig
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.sharding import ShardRule
from shardwise.models.families import FAMILIES, family_of
from shardwise.models.hf_folder import (
    from_hf,
    from_hf_tensors,
    read_config,
    to_hf,
    to_hf_tensors,
    write_config,
)

__all__ = [
    "build",
    "config_class",
    "families",
    "from_hf",
    "from_hf_tensors",
    "parameter_names",
    "read_config",
    "sharding",
    "to_hf",
    "to_hf_tensors",
    "write_config",
]


def families() -> tuple[str, ...]:
    """Names of all model families."""
    return tuple(FAMILIES)


def config_class(family: str) -> type[DecoderConfig]:
    """The config class of a family; raises ConfigError for an unknown one."""
    return family_of(family).config


def sharding(config: DecoderConfig) -> tuple[ShardRule, ...]:
    """The tensor-parallel table of a config's model."""
    return family_of(config).sharding(config.spec)


def build(config: ModelConfig) -> Decoder:
    """The model of a config, on the current default device (``torch.device("meta")`` included).

    Weights are whatever the constructors leave; fill them by `init_weights` or a checkpoint.
    Raises ConfigError for an unknown family or a vocabulary size that is still 0.
    """
    family = family_of(config)
    if config.vocab_size == 0:
        raise ConfigError(
            "model.vocab_size is 0, which means the tokenizer's size; "
            "set it (config.model_copy(update={'vocab_size': n})) before building the model"
        )
    assert isinstance(config, family.config)
    return family.model(config)


def parameter_names(config: ModelConfig) -> list[str]:
    """Of all parameters of a config's model, which need not know its vocabulary yet."""
    assert isinstance(config, DecoderConfig)
    return list(config.spec.shapes())
