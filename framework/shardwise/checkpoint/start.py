"""Describes to the config room the models that recipes start from; see `config.start`.

A Hugging Face folder is described without torch; other forms import what opens them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwise.checkpoint import manifest, steps
from shardwise.config.schema import ModelConfig
from shardwise.config.start import Start, located, register_start_reader
from shardwise.models import travel
from shardwise.models.config_file import ADAPTER, read_config

_TOKENIZERS = {
    "tokenizer.json": "file",
    "tokenizer.model": "sentencepiece",
    "*.tiktoken": "tiktoken",
    "tiktoken.model": "tiktoken",
}


def read_start(ref: str) -> Start:
    """The model and tokenizer sections of a checkpoint, a Hugging Face or PEFT folder, a GGUF file.

    Weights are not read. Raises ShardwiseError for what is none of these.
    """
    place = located(ref)
    return Start(_model(place).model_dump(mode="json"), _tokenizer(place, ref))


def _model(place: Path) -> ModelConfig:
    folder = (place / travel.CONFIG).is_file() and not _is_adapter(place)
    if folder and steps.latest(place) is None and not (place / manifest.NAME).exists():
        return read_config(place)  # without torch
    from shardwise.checkpoint.convert import open_model

    return open_model(place).config


def _is_adapter(place: Path) -> bool:
    return (place / ADAPTER).exists()


def _tokenizer(place: Path, ref: str) -> dict[str, Any] | None:
    """The section for the tokenizer that came with a model; ``ref``: how the recipe names it."""
    if place.is_file():
        return {"kind": "file", "path": ref}
    if (own := steps.latest(place)) is not None:
        place, ref = own, str(own)
    for pattern, kind in _TOKENIZERS.items():
        for file in sorted(place.glob(pattern)):
            return {"kind": kind, "path": f"{ref}/{file.name}"}
    if _is_adapter(place):
        from shardwise.checkpoint.convert import peft_base

        base = peft_base(place)
        return _tokenizer(base, str(base))
    return None


register_start_reader(read_start)
