"""SmolLM3 (Hugging Face 2025): Llama's layers, some without rotary positions (NoPE)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from shardwise.errors import CheckpointError
from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import Base, BiasedConfig, LayerTypes
from shardwise.models.dense.release import (
    ATTENTION_BIAS,
    HEAD_WIDTH_BESIDE,
    WINDOW_WORDS,
    Fields,
    Part,
    Raw,
    Release,
)
from shardwise.models.dense.rope import ROPE, AsTuple, pattern_of, types_from_hf, types_to_hf
from shardwise.ops.rope_scaling import RopeSpec


class SmolLM3Config(BiasedConfig):
    """Layers without positions see the order of tokens by the causal mask alone."""

    family: Literal["smollm3"] = "smollm3"
    rope_base: Base = Field(2e6, description="base of the rotary wavelengths, theta")
    rope_layers: Annotated[tuple[bool, ...], Field(min_length=1), AsTuple] = Field(
        (True, True, True, False),
        description="whether a layer has rotary positions, repeated over the layers",
        examples=[[True, True, True, False]],
    )
    layer_types: LayerTypes | None = Field(
        None,
        description="attention of the layers, repeated over them; null: all with the window",
        examples=[["window", "full"]],
    )
    mlp_bias: bool = Field(False, description="biases of the feed-forward")

    def ropes(self) -> list[RopeSpec | None]:
        """See `DenseConfig.ropes`."""
        rope, has = self.rope(), self.rope_layers
        return [rope if has[i % len(has)] else None for i in range(self.num_layers)]

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(qkv_bias=self.qkv_bias, o_bias=self.o_bias, mlp_bias=self.mlp_bias)


def _layers_from_hf(raw: Raw) -> Fields:
    layers, has = range(raw["num_hidden_layers"]), raw.get("no_rope_layers")
    if has is None:  # a name that says the contrary: 1 is a layer with positions
        has = [(i + 1) % raw["no_rope_layer_interval"] for i in layers]
    if len(has) < len(layers):
        raise CheckpointError(
            f"config.json: no_rope_layers are {len(has)}, and there are {len(layers)} layers"
        )
    rotated = [bool(has[i]) for i in layers]
    windowed = raw["use_sliding_window"] and raw["sliding_window"] is not None
    if raw.get("layer_types") is not None:
        types = types_from_hf(raw)
    else:
        types = ["window" if windowed and not rotated[i] else "full" for i in layers]
    if "window" in types and not windowed:
        said = "layer_types say sliding_attention; set use_sliding_window: true and sliding_window"
        raise CheckpointError(f"config.json: {said}, or write full_attention")
    window = {"sliding_window": raw["sliding_window"], "layer_types": pattern_of(types)}
    return {"rope_layers": pattern_of(rotated)} | (window if "window" in types else {})


def _layers_to_hf(c: Any) -> Fields:
    windowed = any(w is not None for w in c.windows())
    return {
        "no_rope_layers": [int(rope is not None) for rope in c.ropes()],
        "layer_types": types_to_hf(c.windows()),
        "use_sliding_window": windowed,
        "sliding_window": c.sliding_window if windowed else None,
    }


_WORDS = ("no_rope_layers", "no_rope_layer_interval", "use_sliding_window", *WINDOW_WORDS)
RELEASE = Release(
    model_type="smollm3",
    name="SmolLM3",
    config=SmolLM3Config,
    sizes=(128_256, 2048, 11_008, 36, 16),
    keys={"mlp_bias": "mlp_bias"},
    only={"hidden_act": ("silu",)},
    defaults={
        "rope_theta": 2e6, "max_position_embeddings": 32_768, "num_key_value_heads": 4,
        "tie_word_embeddings": True, "mlp_bias": False, "no_rope_layer_interval": 4,
        "use_sliding_window": False, "sliding_window": None,
    },
    parts=(HEAD_WIDTH_BESIDE, ROPE, ATTENTION_BIAS, Part(_WORDS, _layers_from_hf, _layers_to_hf)),
)  # fmt: skip
