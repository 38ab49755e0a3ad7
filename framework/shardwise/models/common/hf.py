"""Our parameter names against Hugging Face's: rules as data, applied to streams of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
         "use_qk_norm", "qk_layernorm", "num_experts", "num_local_experts"), (None, False, 0),
    ),
    **dict.fromkeys(("pruned_heads", "no_rope_layers"), (None, {}, [])),
    "is_causal": (None, True),
}  # fmt: skip


def refuse_foreign(raw: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming the first key by which a model computes otherwise than ours."""
    if raw.get("auto_map"):
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
        if key in said and said[key] not in neutral:
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


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of a Hugging Face checkpoint and our parameters that it holds.

    Several of ours are concatenated, in order and in equal parts, along their first dimension;
    ``transpose`` then swaps the two dimensions (GPT-2 stores linear weights as (in, out)).
    """

    hf: str
    ours: tuple[str, ...]
    transpose: bool = False

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours to theirs."""
        whole = parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
        return whole.t().contiguous() if self.transpose else whole

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Theirs to ours."""
        whole = tensor.t() if self.transpose else tensor
        if whole.shape[0] % len(self.ours):
            raise CheckpointError(
                f"{self.hf}: {whole.shape[0]} rows cannot be cut into {len(self.ours)} equal parts"
            )
        yield from zip(self.ours, (t.contiguous() for t in whole.chunk(len(self.ours))))


def to_hf_stream(
    rules: Iterable[Rule], named: Iterable[tuple[str, Tensor]], ignore: Iterable[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Rename and join a stream of our tensors; each is passed on as soon as it is whole.

    ``ignore`` are names of ours that have no tensor of their own there (a tied head). Raises
    CheckpointError for an unknown or a missing name.
    """
    rule_of = {name: rule for rule in rules for name in rule.ours}
    waiting = dict(rule_of)
    parts: dict[str, Tensor] = {}
    for name, tensor in named:
        if name in ignore:
            continue
        if name not in rule_of:
            raise CheckpointError(f"parameter {name!r} has no place in a Hugging Face checkpoint")
        parts[name] = tensor
        del waiting[name]
        rule = rule_of[name]
        if all(part in parts for part in rule.ours):
            yield rule.hf, rule.join([parts.pop(part) for part in rule.ours])
    if waiting:
        raise CheckpointError(f"parameters missing from the export: {_some(waiting)}")


def from_hf_stream(
    rules: Iterable[Rule],
    named: Iterable[tuple[str, Tensor]],
    prefix: str,
    ignore: Iterable[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Rename and split a stream of their tensors.

    ``prefix`` ("model.") may be absent from all names, as in checkpoints of the bare decoder.
    ``ignore`` are endings of names that carry no weights of ours. Raises CheckpointError for an
    unknown or a missing name.
    """
    waiting = {rule.hf: rule for rule in rules}
    known = set(waiting)
    for name, tensor in named:
        full = name if name in known else prefix + name
        if full in known:
            if full not in waiting:
                raise CheckpointError(f"tensor {full!r} is stored twice, with prefix and without")
            yield from waiting.pop(full).split(tensor)
        elif not name.endswith(tuple(ignore)):
            raise CheckpointError(
                f"tensor {name!r} is not part of this model family; is config.json of another "
                "model?"
            )
    if waiting:
        raise CheckpointError(f"tensors missing from the checkpoint: {_some(waiting)}")


def _some(names: Iterable[str]) -> str:
    """At most five names, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more
