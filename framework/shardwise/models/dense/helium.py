"""Helium (Kyutai 2025): Llama's layers, rotated by pairs of neighbours."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import Base, DenseConfig
from shardwise.models.dense.release import HEAD_WIDTH_USUAL, Release
from shardwise.models.dense.rope import ROPE


class HeliumConfig(DenseConfig):
    """Heads are as wide together as the model."""

    interleaved: ClassVar[bool] = True

    family: Literal["helium"] = "helium"
    rope_base: Base = Field(100_000.0, description="base of the rotary wavelengths, theta")
    qkv_bias: bool = Field(False, description="biases of queries, keys and values")
    mlp_bias: bool = Field(False, description="biases of the feed-forward")

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(qkv_bias=self.qkv_bias, mlp_bias=self.mlp_bias)


RELEASE = Release(
    model_type="helium",
    name="Helium",
    config=HeliumConfig,
    sizes=(48_000, 2560, 7040, 24, 20),
    keys={"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    only={"hidden_act": ("silu",)},
    defaults={
        "max_position_embeddings": 4096, "num_key_value_heads": 20, "head_dim": 128,
        "rms_norm_eps": 1e-8, "rope_theta": 1e5, "attention_bias": False, "mlp_bias": False,
    },
    parts=(HEAD_WIDTH_USUAL, ROPE),
)  # fmt: skip
