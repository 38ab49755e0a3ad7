"""Granite 3 (IBM Granite Team 2024): Llama's layers, with a constant in front of each part."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shardwise.config.schema import PositiveFloat
from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import BiasedConfig
from shardwise.models.dense.release import ATTENTION_BIAS, HEAD_WIDTH_BESIDE, Release
from shardwise.models.dense.rope import ROPE


class ScaledConfig(BiasedConfig):
    """The constants keep activations alike at every width and depth (maximal update)."""

    mlp_bias: bool = Field(False, description="biases of the feed-forward")
    embed_scale: PositiveFloat = Field(1.0, description="of embeddings", examples=[12.0])
    attn_scale: PositiveFloat = Field(
        1.0, description="of attention's scores, in place of 1 / sqrt(head_dim)", examples=[0.0625]
    )
    residual_scale: PositiveFloat = Field(
        1.0, description="of what a layer adds to its input", examples=[0.22]
    )
    logit_divisor: PositiveFloat = Field(1.0, description="logits are divided by it", examples=[8])

    def scaled_spec(self, **switches: Any) -> ModelSpec:
        """See `make_spec`."""
        return self.make_spec(
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            mlp_bias=self.mlp_bias,
            embed_scale=self.embed_scale,
            attn_scale=self.attn_scale,
            residual_scale=self.residual_scale,
            logit_scale=1.0 / self.logit_divisor,
            **switches,
        )


class GraniteConfig(ScaledConfig):
    """Full attention in all layers."""

    family: Literal["granite"] = "granite"

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.scaled_spec()


_SCALES = {
    "embed_scale": "embedding_multiplier",
    "attn_scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_divisor": "logits_scaling",
}
SCALED_KEYS = _SCALES | {"mlp_bias": "mlp_bias"}
SCALED_DEFAULTS = dict.fromkeys(_SCALES.values(), 1.0) | {"mlp_bias": False}
RELEASE = Release(
    model_type="granite",
    name="Granite",
    config=GraniteConfig,
    sizes=(32_000, 4096, 11_008, 32, 32),
    keys=SCALED_KEYS,
    only={"hidden_act": ("silu",)},
    defaults=SCALED_DEFAULTS,
    parts=(HEAD_WIDTH_BESIDE, ROPE, ATTENTION_BIAS),
)
