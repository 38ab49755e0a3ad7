"""Ministral 3 (Mistral AI 2025), its text model: Mistral's layers, whose queries grow far out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shardwise.config.schema import NonNegativeFloat
from shardwise.errors import CheckpointError
from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import Base, DenseConfig
from shardwise.models.dense.release import HEAD_WIDTH, ROPE_WORDS, Fields, Part, Raw, Release
from shardwise.models.dense.rope import ORIGINAL, rope_of, scaling_from_hf, scaling_to_hf
from shardwise.ops.rope_scaling import QueryGrowth


class Ministral3Config(DenseConfig):
    """Beyond the length of its pre-training, attention is sharpened by the query's position."""

    family: Literal["ministral3"] = "ministral3"
    rope_base: Base = Field(1e6, description="base of the rotary wavelengths, theta")
    query_growth: NonNegativeFloat = Field(
        0.1,
        description="queries are multiplied by 1 + this * ln(1 + position // "
        "rope_scaling.original_max_seq_len); 0, or without rope_scaling: by 1",
    )

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        growth, scaling = None, self.rope_scaling
        if self.query_growth and scaling is not None:
            growth = QueryGrowth(rate=self.query_growth, period=scaling.original_max_seq_len)
        return self.make_spec(query_growth=growth)


_BETA = "llama_4_scaling_beta"


def _rope_from_hf(raw: Raw) -> Fields:
    rope = rope_of(raw)
    scaling = scaling_from_hf(rope, raw)
    if scaling is not None and scaling.kind != "yarn":
        raise CheckpointError(f"config.json: rope type {scaling.kind}: ministral3's releases: yarn")
    beta = rope.get(_BETA) or 0.0
    if beta and scaling is None and rope[ORIGINAL] < raw["max_position_embeddings"]:
        raise CheckpointError(f"config.json: {_BETA} without yarn is what no release has")
    base: Any = rope.get("rope_theta", raw["rope_theta"])
    return {"rope_base": float(base), "rope_scaling": scaling, "query_growth": beta}


def _rope_to_hf(c: Any) -> Fields:
    rope: Fields = {"rope_type": "default", ORIGINAL: c.max_seq_len}
    rope |= scaling_to_hf(c.rope_scaling) or {}
    return {"rope_parameters": rope | {"rope_theta": c.rope_base, _BETA: c.query_growth}}


RELEASE = Release(
    model_type="ministral3",
    name="Ministral3",
    config=Ministral3Config,
    sizes=(131_072, 4096, 14_336, 34, 32),
    keys={"sliding_window": "sliding_window"},
    only={"hidden_act": ("silu",)},
    defaults={
        "max_position_embeddings": 262_144, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, ORIGINAL: 16_384,
            "mscale": 1.0, "mscale_all_dim": 1.0, _BETA: 0.1,
        },
    },
    parts=(HEAD_WIDTH, Part(ROPE_WORDS, _rope_from_hf, _rope_to_hf)),
)  # fmt: skip
