"""OLMo 3 (OLMo Team 2025): OLMo 2 with windows in three layers of four, which are not stretched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.config.schema import PositiveInt
from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import Base, BiasedConfig, LayerTypes
from shardwise.models.dense.release import ATTENTION_BIAS, HEAD_WIDTH_BESIDE, Release
from shardwise.models.dense.rope import window_types
from shardwise.models.dense.rope_by_type import ropes_by_type, ropes_of
from shardwise.ops.rope_scaling import RopeSpec

_BASE = 500_000.0


class Olmo3Config(BiasedConfig):
    """A decoder whose branches read the residual stream as it is."""

    family: Literal["olmo3"] = "olmo3"
    rope_base: Base = Field(_BASE, description="base of the rotary wavelengths, in full attention")
    local_rope_base: Base = Field(_BASE, description="the same in layers with a window")
    sliding_window: PositiveInt | None = Field(
        4096, description="tokens seen, itself included", examples=[4096]
    )
    layer_types: LayerTypes = Field(
        ("window",) * 3 + ("full",),
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
            norms="after", qk_norm="projection", qkv_bias=self.qkv_bias, o_bias=self.o_bias
        )


RELEASE = Release(
    model_type="olmo3",
    name="Olmo3",
    config=Olmo3Config,
    sizes=(50_304, 4096, 11_008, 32, 32),
    only={"hidden_act": ("silu",)},
    defaults={"rms_norm_eps": 1e-5, "rope_theta": _BASE, "sliding_window": 4096},
    parts=(
        HEAD_WIDTH_BESIDE,
        ATTENTION_BIAS,
        ropes_by_type("rope_theta", _BASE),
        window_types(4),
    ),
)
