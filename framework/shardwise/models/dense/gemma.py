"""Gemma (Gemma Team 2024): Llama's layers with GeGLU, norms of 1 + weight, a scaled embedding."""

from __future__ import annotations

from typing import Literal

from shardwise.models.common.spec import ModelSpec, NormSpec
from shardwise.models.dense.config import BiasedConfig
from shardwise.models.dense.release import ATTENTION_BIAS, HEAD_WIDTH, Release
from shardwise.models.dense.rope import ROPE


class GemmaConfig(BiasedConfig):
    """Its later generations are `gemma2` and `gemma3`."""

    family: Literal["gemma"] = "gemma"

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(
            NormSpec(eps=self.norm_eps, plus_one=True),
            activation="gelu_tanh",
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            embed_scale=self.hidden_size**0.5,
        )


RELEASE = Release(
    model_type="gemma",
    name="Gemma",
    config=GemmaConfig,
    sizes=(256_000, 3072, 24_576, 28, 16),
    # The first folders say gelu, and their class takes the tanh form for it.
    only={"hidden_act": ("gelu_pytorch_tanh", "gelu")},
    defaults={
        "head_dim": 256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
    },
    parts=(HEAD_WIDTH, ROPE, ATTENTION_BIAS),
)
