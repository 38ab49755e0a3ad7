"""Command R (Cohere 2024): attention and feed-forward side by side behind one norm."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from shardwise.config.schema import PositiveFloat
from shardwise.models.common.spec import ModelSpec, NormSpec
from shardwise.models.dense.config import Base, BiasedConfig
from shardwise.models.dense.release import ATTENTION_BIAS, HEAD_WIDTH_BESIDE, Release
from shardwise.models.dense.rope import ROPE


class CohereBase(BiasedConfig):
    """What its generations share; norms are centred, and have no bias."""

    interleaved: ClassVar[bool] = True

    logit_scale: PositiveFloat = Field(0.0625, description="of logits", examples=[0.0625])

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(
            NormSpec(kind="layer", eps=self.norm_eps, bias=False),
            norms="shared",
            parallel=True,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            logit_scale=self.logit_scale,
        )


class CohereConfig(CohereBase):
    """Full attention in all layers."""

    family: Literal["cohere"] = "cohere"
    rope_base: Base = Field(500_000.0, description="base of the rotary wavelengths, theta")


COHERE_KEYS = {"norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"}
COHERE_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}  # fmt: skip
COHERE_SIZES = (256_000, 8192, 22_528, 40, 64)
RELEASE = Release(
    model_type="cohere",
    name="Cohere",
    config=CohereConfig,
    sizes=COHERE_SIZES,
    keys=COHERE_KEYS,
    only={"hidden_act": ("silu",), "use_qk_norm": (False,)},  # Command R+ has these norms
    defaults=COHERE_DEFAULTS | {"rope_theta": 5e5},
    parts=(HEAD_WIDTH_BESIDE, ROPE, ATTENTION_BIAS),
)
