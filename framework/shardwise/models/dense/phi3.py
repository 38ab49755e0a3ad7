"""Phi-3 (Microsoft 2024) and Phi-4: fused projections in checkpoints, heads rotated in part."""

from __future__ import annotations

from typing import Any, Literal

from shardwise.errors import CheckpointError
from shardwise.models.dense.names import LAYER, Names
from shardwise.models.dense.partial_rope import PARTIAL, PartialConfig
from shardwise.models.dense.release import HEAD_WIDTH_BESIDE, ROPE_WORDS, Fields, Part, Raw, Release
from shardwise.models.dense.rope import ORIGINAL, rope_of, scaling_from_hf, scaling_to_hf


class Phi3Config(PartialConfig):
    """Llama's layers, of whose heads the first features alone may be rotated."""

    family: Literal["phi3"] = "phi3"


def _rope_from_hf(raw: Raw) -> Fields:
    rope = rope_of(raw)
    if rope.get("rope_type", rope.get("type")) == "yarn":  # what its first releases called it
        rope["rope_type"] = "longrope"
    scaling = scaling_from_hf(rope, raw)
    if scaling is not None and scaling.kind != "longrope":
        raise CheckpointError(f"config.json: rope type {scaling.kind}: phi3's class has longrope")
    said = {"rope_theta": raw["rope_theta"], PARTIAL: raw.get(PARTIAL, 1.0)} | rope
    return {
        "rope_base": float(said["rope_theta"]),
        "partial_rotary_factor": said[PARTIAL],
        "rope_scaling": scaling,
    }


def _rope_to_hf(c: Any) -> Fields:
    said = {"rope_theta": c.rope_base, "rope_scaling": None}
    if c.partial_rotary_factor != 1.0:
        said[PARTIAL] = c.partial_rotary_factor
    if (scaling := c.rope_scaling) is None:
        return said
    rope, left_out = scaling_to_hf(scaling) or {}, {"rope_type", ORIGINAL}
    if scaling.factor == c.max_seq_len / scaling.original_max_seq_len:
        left_out.add("factor")  # transformers 4 takes three keys, and the factor from the lengths
    rope = {"type": scaling.kind} | {k: v for k, v in rope.items() if k not in left_out}
    return said | {"rope_scaling": rope, ORIGINAL: scaling.original_max_seq_len}


_ROPE = Part((*ROPE_WORDS, PARTIAL, ORIGINAL), _rope_from_hf, _rope_to_hf)
_CODE = Part(("auto_map",), lambda raw: {}, lambda c: {})  # older than transformers' own, and alike
_DEFAULTS = {"rms_norm_eps": 1e-5, "sliding_window": None, "resid_pdrop": 0.0, ORIGINAL: 4096}
RELEASE = Release(
    model_type="phi3",
    name="Phi3",
    config=Phi3Config,
    sizes=(32_064, 3072, 8192, 32, 32),
    keys={"sliding_window": "sliding_window", "dropout": "resid_pdrop"},
    only={"hidden_act": ("silu",)},
    defaults=_DEFAULTS | {"max_position_embeddings": 4096},
    parts=(HEAD_WIDTH_BESIDE, _ROPE, _CODE),
)
NAMES = Names(
    layer={
        "attn_norm": LAYER["attn_norm"],
        ("attn.q", "attn.k", "attn.v"): "self_attn.qkv_proj",
        "attn.o": LAYER["attn.o"],
        "mlp_norm": LAYER["mlp_norm"],
        ("mlp.gate", "mlp.up"): "mlp.gate_up_proj",
        "mlp.down": LAYER["mlp.down"],
    }
)
