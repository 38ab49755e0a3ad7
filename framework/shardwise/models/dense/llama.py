"""Llama 2 and 3, Mistral and Ministral, Qwen2 and Qwen3, SmolLM2: one family, with switches."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from shardwise.errors import CheckpointError
from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.config import DenseConfig, LayerTypes
from shardwise.models.dense.release import (
    ATTENTION_BIAS,
    HEAD_WIDTH,
    HEAD_WIDTH_BESIDE,
    WINDOW_WORDS,
    Fields,
    Part,
    Raw,
    Release,
)
from shardwise.models.dense.rope import ROPE, types_from_hf, types_to_hf, window_types


class LlamaConfig(DenseConfig):
    """A decoder with RMS norm, rotary positions, grouped-query attention and SwiGLU."""

    family: Literal["llama"] = "llama"
    qkv_bias: bool = Field(False, description="Qwen2: true")
    o_bias: bool = Field(False, description="bias of attention's output")
    mlp_bias: bool = Field(False, description="biases of the feed-forward")
    qk_norm: bool = Field(False, description="Qwen3: true")
    layer_types: LayerTypes | None = Field(
        None,
        description="attention of the layers, repeated over them; null: all with the window",
        examples=[["window", "full"]],
    )

    @model_validator(mode="before")
    @classmethod
    def _first_window(cls, data: Any) -> Any:
        """Checkpoints of old name the first layer with a window."""
        if not isinstance(data, dict) or "window_start_layer" not in data:
            return data
        data = dict(data)
        start, layers = data.pop("window_start_layer"), data.get("num_layers")
        if type(start) is int and type(layers) is int and start > 0:
            data["layer_types"] = ["full" if i < start else "window" for i in range(layers)]
        return data

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            mlp_bias=self.mlp_bias,
            qk_norm="head" if self.qk_norm else None,
        )


# --- classes of transformers, the simplest first --------------------------------------------------


def _window_of_all(raw: Raw) -> Fields:
    """Mistral's class does not look at layer_types."""
    kinds = raw.get("layer_types")
    if kinds and raw["sliding_window"] is not None and set(kinds) != {"sliding_attention"}:
        raise CheckpointError(
            "config.json: layer_types of mistral: only sliding_attention with a sliding_window, as "
            "its class computes"
        )
    return {"sliding_window": raw["sliding_window"]}


def _window_of_qwen(raw: Raw) -> Fields:
    window, layers = raw["sliding_window"], raw["num_hidden_layers"]
    if not raw.get("use_sliding_window", False) or window is None:
        return {}
    if raw.get("layer_types") is not None:
        types = types_from_hf(raw)
    else:
        start = raw.get("max_window_layers", 28)
        types = ["full" if i < start else "window" for i in range(layers)]
    if set(types) == {"full"}:
        return {}
    return {"sliding_window": window, "layer_types": None if "full" not in types else tuple(types)}


def _qwen_window(c: LlamaConfig) -> Fields:
    windows = c.windows()
    start = next((i for i, w in enumerate(windows) if w is not None), None)
    if start is None:
        return {"use_sliding_window": False, "sliding_window": None}
    said = {
        "use_sliding_window": True,
        "sliding_window": c.sliding_window,
        "max_window_layers": start,
    }
    behind = any(w is None for w in windows[start:])
    return said | ({"layer_types": types_to_hf(windows)} if behind else {})


_MISTRAL_WINDOW = Part(WINDOW_WORDS, _window_of_all, lambda c: {"sliding_window": c.sliding_window})
_QWEN_WINDOW = Part(
    ("use_sliding_window", "max_window_layers", *WINDOW_WORDS), _window_of_qwen, _qwen_window
)
_SILU = {"hidden_act": ("silu",)}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096}
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
_MISTRAL_SIZES = (32_000, 4096, 14_336, 32, 32)
_QWEN_SIZES = (151_936, 4096, 22_016, 32, 32)


def _release(model_type: str, name: str, *parts: Part, **rest: Any) -> Release:
    config = LlamaConfig
    return Release(
        model_type=model_type, name=name, config=config, only=_SILU, parts=(ROPE, *parts), **rest
    )


RELEASES = (
    _release(
        "llama",
        "Llama",
        HEAD_WIDTH,
        ATTENTION_BIAS,
        sizes=(32_000, 4096, 11_008, 32, 32),
        keys={"mlp_bias": "mlp_bias"},
        defaults={"mlp_bias": False},
    ),
    _release(
        "mistral", "Mistral", HEAD_WIDTH, _MISTRAL_WINDOW, sizes=_MISTRAL_SIZES, defaults=_MISTRAL
    ),
    _release(
        "ministral",
        "Ministral",
        HEAD_WIDTH,
        window_types(),
        sizes=_MISTRAL_SIZES,
        defaults=_MISTRAL,
    ),
    _release(
        "qwen2",
        "Qwen2",
        HEAD_WIDTH_BESIDE,
        _QWEN_WINDOW,
        fixed={"qkv_bias": True},
        sizes=_QWEN_SIZES,
        defaults=_QWEN,
    ),
    _release(
        "qwen3",
        "Qwen3",
        HEAD_WIDTH,
        ATTENTION_BIAS,
        _QWEN_WINDOW,
        fixed={"qk_norm": True},
        sizes=_QWEN_SIZES,
        defaults=_QWEN | {"head_dim": 128},
    ),
)
