"""Nemotron-4 and Minitron (NVIDIA 2024): squared ReLU, layer norms, half of a head rotated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shardwise.models.common.spec import ModelSpec, NormSpec
from shardwise.models.dense.partial_rope import PartialConfig, partial_rope
from shardwise.models.dense.release import ATTENTION_BIAS, HEAD_WIDTH, Release


class NemotronConfig(PartialConfig):
    """Norms are centred, have a bias, and scale by 1 + weight."""

    family: Literal["nemotron"] = "nemotron"
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="share of a head's features that is rotated", examples=[0.5]
    )
    qkv_bias: bool = Field(False, description="biases of queries, keys and values")
    o_bias: bool = Field(False, description="bias of attention's output")
    mlp_bias: bool = Field(False, description="biases of the feed-forward")

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(
            NormSpec(kind="layer", eps=self.norm_eps, plus_one=True),
            gated=False,
            activation="relu_squared",
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            mlp_bias=self.mlp_bias,
        )


RELEASE = Release(
    model_type="nemotron",
    name="Nemotron",
    config=NemotronConfig,
    sizes=(256_000, 6144, 24_576, 32, 48),
    keys={"norm_eps": "norm_eps", "mlp_bias": "mlp_bias"},
    only={"hidden_act": ("relu2",)},
    defaults={"max_position_embeddings": 4096, "norm_eps": 1e-5, "mlp_bias": False},
    parts=(HEAD_WIDTH, partial_rope(0.5), ATTENTION_BIAS),
)
