"""The config of a Hugging Face folder, without its weights: nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwise import safe_files
from shardwise.errors import CheckpointError, UserError
from shardwise.models import text_part, travel
from shardwise.models.common.config import DecoderConfig
from shardwise.models.releases import release_of, unsupported
from shardwise.models.text_part import INDEX, SINGLE

ADAPTER = "adapter_config.json"

# Counts in a config.json, of every family; 0 or a text would only fail much later.
_COUNTS = (
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "n_positions", "n_embd", "n_inner", "n_layer", "n_head",
)  # fmt: skip


class MissingModelError(UserError, CheckpointError):
    """There is no model at a path; nothing of it is damaged."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError, MissingModelError when there is no file."""
    try:
        found = safe_files.parse_json(safe_files.read_bytes(path))
    except FileNotFoundError:
        raise MissingModelError(
            f"{path} does not exist; a Hugging Face folder holds config.json and *.safetensors"
            f"{instead(path.parent)}"
        ) from None
    except (OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return found


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder that transformers would take for an adapter's."""
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder / ADAPTER}: the folder holds an adapter, whose base model is elsewhere, and "
            "adapters are not read; merge it (peft: merge_and_unload, then save_pretrained), or "
            f"remove {ADAPTER} if the folder's own weights are meant"
        )


def read_config(folder: Path) -> DecoderConfig:
    """The config of a folder, with or without weights; raises as `hf_folder.from_hf`."""
    path = folder / travel.CONFIG
    raw = text_part.own_config(read_json(path), folder)
    refuse_adapter(folder)
    release = release_of(raw.get("model_type"))
    if release is None:
        raise CheckpointError(f"{path}: {unsupported(raw)}")
    _check_counts(raw, path)
    try:
        return release.read(raw)
    except KeyError as error:
        raise CheckpointError(f"{path}: no key {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: a value of a kind that cannot be: {error}") from None


def _check_counts(raw: dict[str, Any], path: Path) -> None:
    for key in _COUNTS:
        if (count := raw.get(key)) is not None and (type(count) is not int or count < 1):
            raise CheckpointError(f"{path}: {key} is {count!r}; allowed: an integer, at least 1")


def instead(folder: Path) -> str:
    """What a folder without readable weights holds, and what to do with it."""
    for pattern, mend in (
        (ADAPTER, "it is an adapter: merge it into its base model first"),
        ("*.gguf", "give the .gguf file itself"),
        ("*-of-*.safetensors", f"shards are read by their index, {INDEX}: fetch it too"),
        ("model.*.safetensors", f"a variant is not chosen by itself: rename it to {SINGLE}"),
        ("*.safetensors", f"rename it to {SINGLE} if it has Hugging Face's names"),
        ("*.bin", "pickled weights are not loaded: convert them to safetensors first"),
        ("*.pt*", "pickled weights are not loaded: convert them to safetensors first"),
    ):
        if found := sorted(folder.glob(pattern)):
            return f" (there is {found[0].name}; {mend})"
    return ""
