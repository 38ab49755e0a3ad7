"""Granite with windows (IBM Granite Team 2026): sinks, and rotary positions by layer."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from shardwise.config.schema import NonNegativeFloat, PositiveInt
from shardwise.errors import CheckpointError
from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import LayerTypes
from shardwise.models.dense.granite import SCALED_DEFAULTS, SCALED_KEYS, ScaledConfig
from shardwise.models.dense.names import LAYER, Names
from shardwise.models.dense.release import (
    ATTENTION_BIAS,
    HEAD_WIDTH_BESIDE,
    Fields,
    Part,
    Raw,
    Release,
)
from shardwise.models.dense.rope import ROPE, AsTuple, pattern_of, window_types
from shardwise.ops.rope_scaling import RopeSpec

Bases = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1), AsTuple]


class GraniteSwaConfig(ScaledConfig):
    """Each head has a learned score to which no value belongs (a sink)."""

    family: Literal["granite_swa"] = "granite_swa"
    sliding_window: PositiveInt | None = Field(
        128, description="tokens seen, itself included", examples=[128]
    )
    layer_types: LayerTypes = Field(
        ("full",) + ("window",) * 3,
        description="attention of the layers, repeated over them",
        examples=[["full", "window"]],
    )
    rope_bases: Bases | None = Field(
        None,
        description="base of each layer, 0: no rotary positions, repeated over the layers; "
        "null: rope_base in all",
        examples=[[0.0, 10_000.0]],
    )

    def ropes(self) -> list[RopeSpec | None]:
        """See `DenseConfig.ropes`."""
        rope, bases = self.rope(), self.rope_bases or (self.rope_base,)
        made = [dataclasses.replace(rope, base=base) if base else None for base in bases]
        return [made[i % len(made)] for i in range(self.num_layers)]

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.scaled_spec(sinks=True)


def _bases_from_hf(raw: Raw) -> Fields:
    if (bases := raw.get("layer_rope_theta")) is None:
        return {}
    if len(bases) != (layers := raw["num_hidden_layers"]):
        raise CheckpointError(
            f"config.json: layer_rope_theta are {len(bases)}, and there are {layers} layers"
        )
    return {"rope_bases": pattern_of([float(base) for base in bases])}


def _bases_to_hf(c: Any) -> Fields:
    return {"layer_rope_theta": [0.0 if rope is None else rope.base for rope in c.ropes()]}


RELEASE = Release(
    model_type="granite_swa",
    name="GraniteSWA",
    config=GraniteSwaConfig,
    sizes=(100_352, 2560, 8192, 24, 20),
    keys=SCALED_KEYS,
    only={"hidden_act": ("silu",)},
    defaults=SCALED_DEFAULTS
    | {
        "max_position_embeddings": 8192, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "sliding_window": 128,
    },
    parts=(
        HEAD_WIDTH_BESIDE,
        ROPE,
        ATTENTION_BIAS,
        window_types(4, first=True),
        Part(("layer_rope_theta",), _bases_from_hf, _bases_to_hf),
    ),
)  # fmt: skip
NAMES = Names(layer=LAYER | {"attn.sinks": "self_attn.sinks"}, bare=frozenset({".sinks"}))
