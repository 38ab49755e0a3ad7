"""A small model of every family, in our keys, with all its switches on."""

from __future__ import annotations

from typing import Any

_SIZES = {
    "hidden_size": 64,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 2,
    "ffn_size": 96,
    "max_seq_len": 256,
}
SMALL: dict[str, dict[str, Any]] = {
    "llama": _SIZES | {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True},
    "gemma2": _SIZES
    | {"sliding_window": 40, "query_scale": 24, "attn_soft_cap": 2.0, "logit_soft_cap": 4.0},
    "gemma3": _SIZES | {"sliding_window": 40, "query_scale": 24, "logit_soft_cap": 4.0},
    "olmo3": _SIZES | {"sliding_window": 40, "tie_embeddings": False},
    "olmo2": _SIZES | {"tie_embeddings": False},
    "smollm3": _SIZES | {"sliding_window": 40, "layer_types": ["full", "window"]},
    "phi3": _SIZES
    | {
        "partial_rotary_factor": 0.8,
        "rope_scaling": {
            "kind": "longrope",
            "factor": 2.0,
            "original_max_seq_len": 8,
            "short_factor": [1.0, 1.0, 1.0],
            "long_factor": [1.0, 1.5, 3.0],
        },
    },
    "granite": _SIZES
    | {"embed_scale": 12.0, "attn_scale": 0.1, "residual_scale": 0.22, "logit_divisor": 8.0},
    "granite_swa": _SIZES
    | {"sliding_window": 40, "layer_types": ["full", "window"], "rope_bases": [0.0, 1e4]}
    | {"embed_scale": 12.0, "attn_scale": 0.1, "residual_scale": 0.22, "logit_divisor": 8.0},
    "ministral3": _SIZES
    | {
        "query_growth": 0.5,
        "rope_scaling": {"kind": "yarn", "factor": 32.0, "original_max_seq_len": 8},
    },
    "seed_oss": _SIZES | {"o_bias": True, "tie_embeddings": False},
    "gemma": _SIZES,
    "starcoder2": _SIZES | {"sliding_window": 40},
    "exaone4": _SIZES | {"sliding_window": 40, "layer_types": ["window", "full"]},
    "glm": _SIZES,
    "glm4": _SIZES | {"tie_embeddings": False},
    "helium": _SIZES | {"qkv_bias": True, "mlp_bias": True},
    "ernie4_5": _SIZES | {"bias": True},
    "arcee": _SIZES | {"mlp_bias": True, "o_bias": True},
    "nemotron": _SIZES | {"mlp_bias": True, "o_bias": True, "qkv_bias": True},
    "gpt_neox": _SIZES | {"tie_embeddings": False, "partial_rotary_factor": 0.5},
    "cohere": _SIZES | {"qkv_bias": True, "o_bias": True, "tie_embeddings": False},
    "cohere2": _SIZES | {"sliding_window": 40, "layer_types": ["window", "full"]},
    "gpt2": {k: v for k, v in _SIZES.items() if k not in ("num_kv_heads", "ffn_size")},
}


def small(family: str, **changes: Any) -> dict[str, Any]:
    """A recipe's model section."""
    return {"family": family} | SMALL[family] | changes
