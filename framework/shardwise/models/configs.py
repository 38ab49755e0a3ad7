"""The config class of each family, in a module without torch; what else they are: `families`."""

from __future__ import annotations

from shardwise.config.registry import register_model_config
from shardwise.models.common.config import DecoderConfig
from shardwise.models.gpt2.config import GPT2Config
from shardwise.models.llama.config import LlamaConfig

CONFIGS: dict[str, type[DecoderConfig]] = {"llama": LlamaConfig, "gpt2": GPT2Config}

for family, config in CONFIGS.items():
    register_model_config(family, config)
