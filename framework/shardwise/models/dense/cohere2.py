"""Command R7B and Command A (Cohere 2025): Command R's layers, which rotate in windows alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.config.schema import PositiveInt
from shardwise.models.dense.cohere import COHERE_DEFAULTS, COHERE_KEYS, COHERE_SIZES, CohereBase
from shardwise.models.dense.config import LayerTypes
from shardwise.models.dense.release import ATTENTION_BIAS, HEAD_WIDTH_USUAL, Release
from shardwise.models.dense.rope import ROPE, window_types
from shardwise.ops.rope_scaling import RopeSpec


class Cohere2Config(CohereBase):
    """Layers without a window see the order of tokens by the causal mask alone."""

    family: Literal["cohere2"] = "cohere2"
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
        rope = self.rope()
        return [None if window is None else rope for window in self.windows()]


RELEASE = Release(
    model_type="cohere2",
    name="Cohere2",
    config=Cohere2Config,
    sizes=COHERE_SIZES,
    keys=COHERE_KEYS,
    only={"hidden_act": ("silu",)},
    defaults=COHERE_DEFAULTS | {"sliding_window": 4096},
    parts=(
        HEAD_WIDTH_USUAL, ROPE, ATTENTION_BIAS, window_types(4, "sliding_window_pattern"),
    ),
)  # fmt: skip
