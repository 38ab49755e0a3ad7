"""Seed-OSS (ByteDance Seed 2025): Llama's layers, with biases of queries, keys and values."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import DenseConfig
from shardwise.models.dense.release import HEAD_WIDTH, Release
from shardwise.models.dense.rope import ROPE


class SeedOssConfig(DenseConfig):
    """Attention's output has a bias by a key of its own."""

    family: Literal["seed_oss"] = "seed_oss"
    qkv_bias: bool = Field(True, description="biases of queries, keys and values")
    o_bias: bool = Field(False, description="bias of attention's output")

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(qkv_bias=self.qkv_bias, o_bias=self.o_bias)


RELEASE = Release(
    model_type="seed_oss",
    name="SeedOss",  # for SeedOssForCausalLM
    config=SeedOssConfig,
    sizes=(155_136, 4096, 27_648, 64, 80),  # its class's own, as are the defaults
    # Ours against theirs, beside those that all families have.
    keys={
        "qkv_bias": "attention_bias", "o_bias": "attention_out_bias",
        "dropout": "residual_dropout",
    },
    # What their class takes for a key that is not there.
    defaults={
        "attention_bias": True, "attention_out_bias": False, "residual_dropout": 0.1,
        "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 524_288,
    },
    only={"hidden_act": ("silu",), "mlp_bias": (False,)},  # all else is refused
    parts=(HEAD_WIDTH, ROPE),
)  # fmt: skip
