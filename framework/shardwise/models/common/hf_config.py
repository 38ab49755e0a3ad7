"""What every family's config.json has in common: the head, and what no family computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from shardwise.errors import CheckpointError

# Where a decoder's head stands, by `DecoderConfig.head`.
HEADS = {"vocabulary": "lm_head.weight", "scalar": "score.weight"}
_SCORES = "ForSequenceClassification"
LABELS = ("id2label", "label2id", "num_labels", "problem_type")  # keys of a scalar head alone


# Keys of a config.json by which a model computes what ours do not, and the values that say nothing.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("attention_chunk_size", "clip_qkv", "query_pre_attn_scalar", "final_logit_softcapping",
         "attn_logit_softcapping"), (None,),
    ),
    **dict.fromkeys(
        ("partial_rotary_factor", "embedding_multiplier", "residual_multiplier", "logits_scaling",
         "attention_multiplier", "logit_scale", "scale_emb", "scale_depth"), (None, 1),
    ),
    **dict.fromkeys(
        ("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention", "alibi",
         "use_qk_norm", "qk_layernorm", "mlp_bias", "num_experts", "num_local_experts"),
        (None, False, 0),
    ),
    **dict.fromkeys(("pruned_heads", "no_rope_layers"), (None, {}, [])),
    "is_causal": (None, True),
}  # fmt: skip


def refuse_foreign(raw: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """Raise CheckpointError naming the first key by which a model computes otherwise than ours.

    ``known`` keys are those that its family reads.
    """
    if raw.get("auto_map") and "auto_map" not in known:
        raise CheckpointError(
            "config.json: auto_map names code that computes the model, and such code is never run; "
            f"remove the key if transformers' own {raw.get('model_type')} computes the same"
        )
    if quantised := raw.get("quantization_config") or raw.get("compression_config"):
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise CheckpointError(
            f"config.json: quantization_config: weights quantised by {method} are not read; load "
            "them with transformers, dequantize() and save them in bf16"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    said = {**(rope if isinstance(rope, Mapping) else {}), **raw}
    for key, neutral in _FOREIGN.items():
        if key not in known and key in said and said[key] not in neutral:
            raise CheckpointError(
                f"config.json: {key} = {said[key]!r} means a computation that is not done here; "
                "remove the key if the weights do without it"
            )


def head_from_hf(raw: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """``head`` and ``tie_embeddings`` of a config.json; a class of several labels is refused."""
    names = raw.get("architectures") or []
    if not any(str(name).endswith(_SCORES) for name in names):
        return {"tie_embeddings": tied}
    labels = raw.get("num_labels", len(raw.get("id2label") or {}) or 2)
    if labels != 1:
        raise CheckpointError(
            f"config.json: a {names[0]} of {labels} labels; only one, a score, can be a head here"
        )
    return {"head": "scalar", "tie_embeddings": False}


def head_to_hf(head: str, name: str, decoder: str) -> dict[str, Any]:
    """Keys of config.json that choose the class: the family's decoder, or its scorer."""
    if head == "vocabulary":
        return {"architectures": [decoder]}
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return {"architectures": [name + _SCORES], "problem_type": "regression", **labels}
