"""The table of model families. Adding one costs a folder, a row here and one in `configs`."""

from __future__ import annotations

import dataclasses
from types import ModuleType

from shardwise.config.schema import ModelConfig
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.sharding import ShardRule
from shardwise.models.configs import CONFIGS
from shardwise.models.gpt2 import hf as gpt2_hf
from shardwise.models.gpt2.model import GPT2
from shardwise.models.gpt2.sharding import SHARDING as GPT2_SHARDING
from shardwise.models.llama import hf as llama_hf
from shardwise.models.llama.model import Llama
from shardwise.models.llama.sharding import SHARDING as LLAMA_SHARDING


@dataclasses.dataclass(frozen=True)
class Family:
    """All that the house knows of a family."""

    config: type[DecoderConfig]
    model: type[Decoder]
    hf: ModuleType  # rules, config_from_hf, config_to_hf, MODEL_TYPES, PREFIX, IGNORE, OTHER_WORDS
    sharding: tuple[ShardRule, ...]


FAMILIES = {
    "llama": Family(CONFIGS["llama"], Llama, llama_hf, LLAMA_SHARDING),
    "gpt2": Family(CONFIGS["gpt2"], GPT2, gpt2_hf, GPT2_SHARDING),
}


def family_of(config: ModelConfig | str) -> Family:
    """The row of a config or a name; raises ConfigError for an unknown family."""
    name = config if isinstance(config, str) else config.family
    if name not in FAMILIES:
        raise ConfigError(f"unknown model.family {name!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
