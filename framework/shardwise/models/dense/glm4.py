"""GLM-4-0414 and GLM-Z1 (Zhipu AI 2025): GLM-4 with norms around each branch."""

from __future__ import annotations

from typing import Literal

from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.glm import FUSED, GlmBase, glm_release
from shardwise.models.dense.names import Names


class Glm4Config(GlmBase):
    """GLM-4's layers, whose branches are normed behind, too."""

    family: Literal["glm4"] = "glm4"

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(norms="around", qkv_bias=self.qkv_bias)


RELEASE = glm_release("glm4", "Glm4", Glm4Config)
NAMES = Names(
    layer=FUSED
    | {"attn_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm"}
)
