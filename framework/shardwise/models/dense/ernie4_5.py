"""ERNIE 4.5, its dense models (Baidu 2025): Llama's layers, rotated by pairs of neighbours."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import Base, DenseConfig
from shardwise.models.dense.release import HEAD_WIDTH, Release
from shardwise.models.dense.rope import ROPE


class Ernie45Config(DenseConfig):
    """Every linear layer has a bias, or none has."""

    interleaved: ClassVar[bool] = True

    family: Literal["ernie4_5"] = "ernie4_5"
    rope_base: Base = Field(500_000.0, description="base of the rotary wavelengths, theta")
    bias: bool = Field(False, description="biases of all linear layers")

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(qkv_bias=self.bias, o_bias=self.bias, mlp_bias=self.bias)


RELEASE = Release(
    model_type="ernie4_5",
    name="Ernie4_5",
    config=Ernie45Config,
    sizes=(103_424, 1024, 3072, 18, 16),
    keys={"bias": "use_bias"},
    only={"hidden_act": ("silu",)},
    defaults={
        "max_position_embeddings": 131_072, "num_key_value_heads": 2, "head_dim": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "use_bias": False, "tie_word_embeddings": True,
    },
    parts=(HEAD_WIDTH, ROPE),
)  # fmt: skip
