"""Describes to the config room the models that recipes start from; see `config.start`.

Nothing here imports torch before a folder is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwise.config.start import Start, located, register_start_reader

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
    from shardwise.checkpoint.convert import describe

    place = located(ref)
    section = describe(place).model_dump(mode="json")
    return Start(section, _tokenizer(place, ref))


def _tokenizer(place: Path, ref: str) -> dict[str, Any] | None:
    """The section for the tokenizer that came with a model; ``ref``: how the recipe names it."""
    from shardwise.adapters.peft_read import is_adapter_folder
    from shardwise.checkpoint import steps
    from shardwise.checkpoint.convert import peft_base

    if place.is_file():
        return {"kind": "file", "path": ref}
    if (own := steps.latest(place)) is not None:
        place, ref = own, str(own)
    for pattern, kind in _TOKENIZERS.items():
        for file in sorted(place.glob(pattern)):
            return {"kind": kind, "path": f"{ref}/{file.name}"}
    if is_adapter_folder(place):
        base = peft_base(place)
        return _tokenizer(base, str(base))
    return None


register_start_reader(read_start)
