"""EXAONE 4 (LG AI Research 2025): norms behind branches, rotation in windows alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.config.schema import PositiveInt
from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import DenseConfig, LayerTypes
from shardwise.models.dense.release import HEAD_WIDTH_BESIDE, Release
from shardwise.models.dense.rope import ROPE, window_types
from shardwise.ops.rope_scaling import RopeSpec


class Exaone4Config(DenseConfig):
    """A decoder whose branches read the residual stream as it is; without windows, all rotate."""

    family: Literal["exaone4"] = "exaone4"
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
        rope, rotates = self.rope(), self.sliding_window is None
        return [rope if rotates or type_ == "window" else None for type_ in self.types()]

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(norms="after", qk_norm="head")


RELEASE = Release(
    model_type="exaone4",
    name="Exaone4",
    config=Exaone4Config,
    sizes=(102_400, 4096, 16_384, 32, 32),
    only={"hidden_act": ("silu",)},
    defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096},
    parts=(HEAD_WIDTH_BESIDE, ROPE, window_types(4, "sliding_window_pattern")),
)
