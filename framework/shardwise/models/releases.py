"""Which class of transformers a config.json is of, and which one can say a config of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.errors import CheckpointError
from shardwise.models.common.config import DecoderConfig
from shardwise.models.configs import TABLES
from shardwise.models.dense.release import Release
from shardwise.models.text_part import WRAPPERS


def releases() -> list[Release]:
    """Those of all families."""
    return [release for table in TABLES.values() for release in table.releases]


def release_of(model_type: Any) -> Release | None:
    """The one of a config.json's model_type."""
    return next((r for r in releases() if r.model_type == model_type), None)


def release_for(config: DecoderConfig, first: Release | None = None) -> Release:
    """A class that computes what ``config`` says, ``first`` if it does.

    Raises CheckpointError, naming what the nearest one has otherwise, if there is none.
    """
    known = list(TABLES[config.family].releases)
    asked = sorted(known, key=lambda release: release is not first)
    lacking = {release: release.lacks(config) for release in asked}
    nearest = min(asked, key=lambda release: len(lacking[release]))
    if lacking[nearest]:
        raise CheckpointError(
            f"no transformers class computes this {config.family} model; the nearest, "
            f"{nearest.name}{nearest.decoder}, has otherwise: {', '.join(lacking[nearest])}"
        )
    return nearest


# Keys by which models of other kinds say what they have, and what that is.
_MISSING = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "kv_lora_rank": "latent attention (MLA)",
    "is_encoder_decoder": "an encoder",
    "vision_config": "an image encoder",
    "audio_config": "an audio encoder",
    "clip_qkv": "clipped queries, keys and values",
    "ssm_cfg": "a state-space layer",
    "mamba_d_state": "a state-space layer",
    "linear_num_value_heads": "linear attention",
    "alibi": "attention with linear biases (ALiBi)",
    "parallel_attn": "attention beside the feed-forward",
    "use_parallel_residual": "attention beside the feed-forward",
}
# Keys that say nothing of a model's kind.
_COMMON = {"model_type", "architectures", "vocab_size", "dtype", "torch_dtype", "use_cache"}
_COMMON |= {"transformers_version", "initializer_range", "attention_dropout", "tie_word_embeddings"}
_COMMON |= {f"{kind}_token_id" for kind in ("bos", "eos", "pad")}


def unsupported(raw: Mapping[str, Any]) -> str:
    """Why a config.json of another model_type is not read: what is missing, and what is nearest."""
    said = {k for k, v in raw.items() if v not in (None, False)} - _COMMON
    missing = list(dict.fromkeys(what for key, what in _MISSING.items() if key in said))
    nearest = max(releases(), key=lambda release: len(release.words & said))
    unread = sorted(said - nearest.words)
    known = ", ".join(release.model_type for release in releases())
    parts = [f"model_type {raw.get('model_type')!r} is not supported"]
    if isinstance(text := raw.get("text_config"), Mapping):
        parts.append(
            f"whether it computes what the {text.get('model_type')} of its text_config alone does "
            f"is not known here, as it is of {', '.join(WRAPPERS)}; save that model by itself"
        )
    if missing:
        parts.append(f"missing here: {', '.join(missing)}")
    if nearest.words & said:
        words = f", which does not read {', '.join(unread[:6])}" if unread else ""
        parts.append(f"the nearest by its keys is {nearest.model_type}{words}")
    return "; ".join([*parts, f"supported: {known}"])
