"""StarCoder2 (BigCode 2024): layer norms, GPT-2's feed-forward, rotary positions, grouped heads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.models.common.spec import ModelSpec, NormSpec
from shardwise.models.dense.config import DenseConfig
from shardwise.models.dense.names import LAYER, Names
from shardwise.models.dense.release import HEAD_WIDTH_BESIDE, Release
from shardwise.models.dense.rope import ROPE


class Starcoder2Config(DenseConfig):
    """Every linear layer has a bias, or none has."""

    family: Literal["starcoder2"] = "starcoder2"
    bias: bool = Field(True, description="biases of all linear layers")

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(
            NormSpec(kind="layer", eps=self.norm_eps),
            gated=False,
            activation="gelu_tanh",
            qkv_bias=self.bias,
            o_bias=self.bias,
            mlp_bias=self.bias,
        )


RELEASE = Release(
    model_type="starcoder2",
    name="Starcoder2",
    config=Starcoder2Config,
    sizes=(49_152, 3072, 12_288, 30, 24),
    keys={
        "norm_eps": "norm_epsilon",
        "bias": "use_bias",
        "sliding_window": "sliding_window",
        "dropout": "residual_dropout",
    },
    only={"hidden_act": ("gelu_pytorch_tanh",)},
    defaults={
        "max_position_embeddings": 4096, "num_key_value_heads": 2, "norm_epsilon": 1e-5,
        "use_bias": True, "sliding_window": None, "residual_dropout": 0.0,
        "tie_word_embeddings": True,
    },
    parts=(HEAD_WIDTH_BESIDE, ROPE),
)  # fmt: skip
NAMES = Names(layer=LAYER | {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"})
