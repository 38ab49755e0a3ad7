"""OLMo 2 (OLMo Team 2024): norms behind each branch alone, and over whole queries and keys."""

from __future__ import annotations

from typing import Literal

from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import BiasedConfig
from shardwise.models.dense.names import LAYER, Names
from shardwise.models.dense.release import ATTENTION_BIAS, HEAD_WIDTH_BESIDE, Release
from shardwise.models.dense.rope import ROPE


class Olmo2Config(BiasedConfig):
    """A decoder whose branches read the residual stream as it is."""

    family: Literal["olmo2"] = "olmo2"

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(
            norms="after", qk_norm="projection", qkv_bias=self.qkv_bias, o_bias=self.o_bias
        )


RELEASE = Release(
    model_type="olmo2",
    name="Olmo2",
    config=Olmo2Config,
    sizes=(50_304, 4096, 11_008, 32, 32),
    only={"hidden_act": ("silu",)},
    defaults={"rms_norm_eps": 1e-5},
    parts=(HEAD_WIDTH_BESIDE, ROPE, ATTENTION_BIAS),
)
NAMES = Names(
    layer=LAYER
    | {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
)
