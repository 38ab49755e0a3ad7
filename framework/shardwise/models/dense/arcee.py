"""AFM (Arcee 2025): Llama's attention, and a feed-forward of squared ReLU without a gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import BiasedConfig
from shardwise.models.dense.release import ATTENTION_BIAS, HEAD_WIDTH, Release
from shardwise.models.dense.rope import ROPE


class ArceeConfig(BiasedConfig):
    """Most features of its feed-forward are zero for a token (So et al. 2021, Primer)."""

    family: Literal["arcee"] = "arcee"
    mlp_bias: bool = Field(False, description="biases of the feed-forward")

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(
            gated=False,
            activation="relu_squared",
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            mlp_bias=self.mlp_bias,
        )


RELEASE = Release(
    model_type="arcee",
    name="Arcee",
    config=ArceeConfig,
    sizes=(32_000, 2560, 18_432, 32, 32),
    keys={"mlp_bias": "mlp_bias"},
    only={"hidden_act": ("relu2",)},
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "mlp_bias": False},
    parts=(HEAD_WIDTH, ROPE, ATTENTION_BIAS),
)
