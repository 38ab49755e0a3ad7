"""Gemma 2 (Gemma Team 2024): soft caps, norms around each branch, every other layer a window."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.config.schema import PositiveFloat, PositiveInt
from shardwise.models.common.spec import ModelSpec, NormSpec
from shardwise.models.dense.config import BiasedConfig, LayerTypes
from shardwise.models.dense.names import LAYER, Names
from shardwise.models.dense.release import ATTENTION_BIAS, HEAD_WIDTH, Release
from shardwise.models.dense.rope import ROPE, window_types


class Gemma2Config(BiasedConfig):
    """Norms scale by 1 + weight, and the embedding by the root of its width."""

    family: Literal["gemma2"] = "gemma2"
    query_scale: PositiveInt = Field(
        256, description="scores are divided by its root, whatever the heads' width"
    )
    attn_soft_cap: PositiveFloat | None = Field(
        50.0, description="scores become cap * tanh(score / cap); null: none", examples=[50.0]
    )
    logit_soft_cap: PositiveFloat | None = Field(
        30.0, description="the same of logits", examples=[30.0]
    )
    sliding_window: PositiveInt | None = Field(
        4096, description="tokens seen, itself included", examples=[4096]
    )
    layer_types: LayerTypes = Field(
        ("window", "full"),
        description="attention of the layers, repeated over them",
        examples=[["window", "full"]],
    )

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(
            NormSpec(eps=self.norm_eps, plus_one=True),
            norms="around",
            activation="gelu_tanh",
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            attn_scale=self.query_scale**-0.5,
            attn_soft_cap=self.attn_soft_cap,
            logit_soft_cap=self.logit_soft_cap,
            embed_scale=self.hidden_size**0.5,
        )


GEMMA_ONLY = {"hidden_activation": ("gelu_pytorch_tanh",)}
GEMMA_DEFAULTS = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
RELEASE = Release(
    model_type="gemma2",
    name="Gemma2",
    config=Gemma2Config,
    sizes=(256_000, 2304, 9216, 26, 8),
    keys={
        "query_scale": "query_pre_attn_scalar",
        "attn_soft_cap": "attn_logit_softcapping",
        "logit_soft_cap": "final_logit_softcapping",
    },
    only=GEMMA_ONLY,
    defaults=GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    parts=(HEAD_WIDTH, ROPE, ATTENTION_BIAS, window_types(2)),
)
NAMES = Names(
    layer=LAYER
    | {
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
)
