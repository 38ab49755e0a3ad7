"""GLM-4 (Team GLM 2024): half of a head is rotated, by pairs of neighbours."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from shardwise.config.schema import Epsilon
from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.names import LAYER, Modules, Names
from shardwise.models.dense.partial_rope import PartialConfig, partial_rope
from shardwise.models.dense.release import HEAD_WIDTH, Release


class GlmBase(PartialConfig):
    """What its two generations share."""

    interleaved: ClassVar[bool] = True

    norm_eps: Epsilon = Field(1.5625e-7, description="added to the mean square in norms")
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="share of a head's features that is rotated", examples=[0.5]
    )
    qkv_bias: bool = Field(True, description="biases of queries, keys and values")


class GlmConfig(GlmBase):
    """Llama's layers, with biases of queries, keys and values."""

    family: Literal["glm"] = "glm"

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(qkv_bias=self.qkv_bias)


def glm_release(model_type: str, name: str, config: type[GlmBase]) -> Release:
    """Both generations have the same keys, and take the same for those that are not there."""
    return Release(
        model_type=model_type,
        name=name,
        config=config,
        sizes=(151_552, 4096, 13_696, 40, 32),
        keys={"qkv_bias": "attention_bias"},
        only={"hidden_act": ("silu",)},
        defaults={
            "max_position_embeddings": 131_072, "num_key_value_heads": 2, "head_dim": 128,
            "rms_norm_eps": 1.5625e-7, "attention_bias": True,
        },
        parts=(HEAD_WIDTH, partial_rope(0.5)),
    )  # fmt: skip


RELEASE = glm_release("glm", "Glm", GlmConfig)
_APART = ("mlp.gate", "mlp.up")
FUSED: dict[Modules, str] = {k: v for k, v in LAYER.items() if k not in _APART}
FUSED[_APART] = "mlp.gate_up_proj"
NAMES = Names(layer=FUSED)
