"""The text model inside of a folder of a multimodal one, which is read as if it stood alone.

Gemma 3 from 4B up, Ministral 3 and their kind are published as one class around an encoder of
images (or sounds), a projector and a text model of a family that we have. Fed with tokens alone,
that class computes what its text model computes: tests hold each class of `WRAPPERS` to it, and
others are refused. (Qwen's rotate by three positions of a place in an image; of a token in a text,
these are one.) So its ``text_config`` is the config.json of the text model, and of the weights
those are read that stand under its name; the rest is left out, which `described` says.

No torch here: configs are read without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from shardwise import safe_files
from shardwise.errors import CheckpointError

CONFIG = "config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TIED = "tie_word_embeddings"

# By model_type: the one of a text_config that does not say its own, as transformers has it.
WRAPPERS: dict[str, str] = {
    "gemma3": "gemma3_text",
    "mistral3": "mistral",
    "llava": "llama",
    "llava_next": "llama",
    "llava_next_video": "llama",
    "llava_onevision": "qwen2",
    "vipllava": "llama",
    "video_llava": "llama",
    "internvl": "qwen2",
    "idefics2": "mistral",
    "idefics3": "llama",
    "smolvlm": "llama",
    "deepseek_vl": "llama",
    "got_ocr2": "qwen2",
    "ovis2": "qwen2",
    "voxtral": "llama",
    "qwen2_audio": "qwen2",
    "audioflamingo3": "qwen2",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
}
# Text models that are another's by another name.
_OTHER_NAMES = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
_QWEN2_VL = {
    "vocab_size": 152_064, "hidden_size": 8192, "intermediate_size": 29_568,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "max_window_layers": 80,
    "rope_theta": 1e6,
}  # fmt: skip
# What those, or the text models of a whole, take for keys that are not there.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": {"max_position_embeddings": 128_000, "rope_theta": 500_000.0},
    "voxtral": {
        "vocab_size": 131_072, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 30, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1e8,
    },
}  # fmt: skip
_FLAT = ("qwen2_vl", "qwen2_5_vl")  # whose text_config's keys may stand among the whole's
# Where a text model's tensors stand, by version of transformers; what is behind is as it is alone.
_TEXT = ("model.language_model.", "language_model.", "model.text_model.")
_BARE = ("model.layers.", "model.embed_tokens.", "model.norm.")  # as they are alone
_HEAD = "lm_head.weight"  # beside them, or inside
# Of all else, by the first part of a name ("model." in front or not).
_OTHERS = frozenset(
    ("vision_tower", "vision_model", "visual", "image_tower", "video_tower", "audio_tower")
    + ("multi_modal_projector", "connector", "aligner", "image_newline", "visual_embeddings_table")
)
# Of the whole, and of its text model too.
_SHARED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version",
    "quantization_config", "compression_config", "auto_map",
)  # fmt: skip
_PROCESSOR = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "chat_template.json",
)  # fmt: skip
Kept = TypeVar("Kept")


def is_whole(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a multimodal model whose text model can be read."""
    kind = raw.get("model_type")
    return isinstance(kind, str) and kind in WRAPPERS and isinstance(_text_config(raw), Mapping)


def _text_config(raw: Mapping[str, Any]) -> Any:
    if raw.get("text_config") is not None or raw["model_type"] not in _FLAT:
        return raw.get("text_config")
    seen = ("vision_", "image_", "video_")
    return {k: v for k, v in raw.items() if k != "model_type" and not k.startswith(seen)}


def own_config(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config.json of the text model; any other one as it is.

    Where the two configs do not say alike whether the head is the embedding, the weights of
    ``folder`` do. Raises CheckpointError for weight files that cannot be read.
    """
    if not is_whole(raw):
        return raw
    said = {k: v for k, v in _text_config(raw).items() if v is not None or k not in _SHARED}
    for key in ("architectures", "_name_or_path"):  # of what it was made from
        said.pop(key, None)
    shared = {key: raw[key] for key in _SHARED if raw.get(key) is not None}
    kind = said.pop("model_type", None) or WRAPPERS[raw["model_type"]]
    if not isinstance(kind, str):
        raise CheckpointError(f"{folder / CONFIG}: text_config: model_type is {kind!r}, no text")
    defaults = _DEFAULTS.get(raw["model_type"], {}) | _DEFAULTS.get(kind, {})
    made = defaults | shared | _one_position(said) | {"model_type": _OTHER_NAMES.get(kind, kind)}
    ties = [c.get(TIED) for c in (raw, said)]
    if None in ties or ties[0] != ties[1]:
        names = stored_names(folder)
        if names:
            made[TIED] = not any(name.endswith(_HEAD) for name in names)
        elif ties[0] is not None:
            made[TIED] = ties[0]  # transformers 5 asks the whole's
    return made


def _one_position(said: dict[str, Any]) -> dict[str, Any]:
    """The same config without what says how three positions share the rotated pairs."""
    made = dict(said)
    for word in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := said.get(word), Mapping):
            kept = {k: v for k, v in rope.items() if not k.startswith("mrope_")}
            made[word] = {k: "default" if v == "mrope" else v for k, v in kept.items()}
    return made


def tensors(named: Iterable[tuple[str, Kept]]) -> Iterator[tuple[str, Kept]]:
    """Of a stream of a whole model's, the text model's, under its names.

    Raises CheckpointError for a name of no known part.
    """
    for name, tensor in named:
        if (own := _own_name(name)) is not None:
            yield own, tensor


def _own_name(name: str) -> str | None:
    """In the text model; None of what is left out."""
    if name == _HEAD or name.startswith(_BARE):
        return name
    for prefix in _TEXT:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    if _part(name) in _OTHERS:
        return None
    raise CheckpointError(
        f"tensor {name!r} is of no part of a multimodal model that is known here; the text model's "
        f"begin with {', '.join(_TEXT)}, and left out are {', '.join(sorted(_OTHERS))}"
    )


def _part(name: str) -> str:
    return name.removeprefix("model.").partition(".")[0]


def described(folder: Path) -> str:
    """What of a folder is read and what is left out, in words; empty for any but such a one.

    Raises CheckpointError as `own_config` and `tensors` do.
    """
    path = folder / CONFIG
    raw = safe_files.parse_json(safe_files.read_bytes(path)) if path.is_file() else None
    if not isinstance(raw, dict) or not is_whole(raw):
        return ""
    names = raw.get("architectures")
    whole = names[0] if isinstance(names, list) and names else raw["model_type"]
    parts = [_part(name) for name in stored_names(folder) if _own_name(name) is None]
    ignored = [name for name in _PROCESSOR if (folder / name).exists()]
    left = [f"{', '.join(sorted(set(parts)))} ({len(parts)} tensors)"] if parts else []
    left += [", ".join(ignored)] if ignored else []
    return f"the text model of {whole}; left out: {' and '.join(left) or 'all else'}"


def stored_names(folder: Path) -> list[str]:
    """Names of the tensors in a folder's weight files; none where there are no such files."""
    from safetensors import SafetensorError, safe_open  # commands that read no weights do without

    try:
        if (folder / SINGLE).exists():
            safe_files.open_regular(folder / SINGLE).close()
            with safe_open(folder / SINGLE, framework="numpy") as file:
                return list(file.keys())
        if (folder / INDEX).exists():
            index = safe_files.parse_json(safe_files.read_bytes(folder / INDEX))
            return [str(name) for name in index["weight_map"]]
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: its weight files cannot be read: {error}") from None
    return []
