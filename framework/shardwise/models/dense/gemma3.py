"""Gemma 3, its text model (Gemma Team 2025): windows of five layers in six, which turn faster."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.config.schema import PositiveFloat, PositiveInt
from shardwise.models.common.spec import ModelSpec, NormSpec
from shardwise.models.dense.config import Base, BiasedConfig, LayerTypes
from shardwise.models.dense.gemma2 import GEMMA_DEFAULTS, GEMMA_ONLY
from shardwise.models.dense.release import ATTENTION_BIAS, HEAD_WIDTH, Release
from shardwise.models.dense.rope import window_types
from shardwise.models.dense.rope_by_type import ropes_by_type, ropes_of
from shardwise.ops.rope_scaling import RopeSpec


class Gemma3Config(BiasedConfig):
    """Gemma 2's blocks, with norms of queries and keys in place of soft caps."""

    family: Literal["gemma3"] = "gemma3"
    query_scale: PositiveInt = Field(
        256, description="scores are divided by its root, whatever the heads' width"
    )
    logit_soft_cap: PositiveFloat | None = Field(
        None, description="logits become cap * tanh(logit / cap); null: none", examples=[30.0]
    )
    rope_base: Base = Field(1e6, description="base of the rotary wavelengths, in full attention")
    local_rope_base: Base = Field(10_000.0, description="the same in layers with a window")
    sliding_window: PositiveInt | None = Field(
        4096, description="tokens seen, itself included", examples=[1024]
    )
    layer_types: LayerTypes = Field(
        ("window",) * 5 + ("full",),
        description="attention of the layers, repeated over them",
        examples=[["window", "full"]],
    )

    def ropes(self) -> list[RopeSpec | None]:
        """See `DenseConfig.ropes`."""
        return ropes_of(self, self.local_rope_base)

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(
            NormSpec(eps=self.norm_eps, plus_one=True),
            norms="around",
            activation="gelu_tanh",
            qk_norm="head",
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            attn_scale=self.query_scale**-0.5,
            logit_soft_cap=self.logit_soft_cap,
            embed_scale=self.hidden_size**0.5,
        )


RELEASE = Release(
    model_type="gemma3_text",
    name="Gemma3",
    scorer="Gemma3Text",
    config=Gemma3Config,
    sizes=(262_208, 2304, 9216, 26, 8),
    keys={"query_scale": "query_pre_attn_scalar", "logit_soft_cap": "final_logit_softcapping"},
    only=GEMMA_ONLY,
    defaults=GEMMA_DEFAULTS
    | {"max_position_embeddings": 131_072, "rope_theta": 1e6, "final_logit_softcapping": None},
    parts=(
        HEAD_WIDTH,
        ATTENTION_BIAS,
        ropes_by_type("rope_local_base_freq", 10_000.0),
        window_types(6, "sliding_window_pattern"),
    ),
)
