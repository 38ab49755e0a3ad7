"""What stands beside a vocabulary: its settings, the chat template, the model's end tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwise.errors import CheckpointError, DataError
from shardwise.models import travel


def read_settings(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files beside a vocabulary that travel with it, and what they say together.

    As in transformers, special_tokens_map.json counts where tokenizer_config.json lists no tokens,
    and chat_template.jinja more than either. Raises DataError naming the file.
    """
    try:
        files = travel.read(folder, travel.SETTINGS)
        config = travel.parse(files, travel.TOKENIZER_CONFIG)
        if "added_tokens_decoder" not in config:
            config |= travel.parse(files, travel.SPECIAL_TOKENS)
        template = travel.template(files, config)
    except CheckpointError as error:
        raise DataError(f"{folder}/{error}") from error
    return files, config | {"chat_template": template}


def end_ids(folder: Path) -> tuple[int, ...]:
    """The end tokens that the model beside a tokenizer names."""
    try:
        return travel.end_ids(travel.read(folder, travel.MODEL))
    except CheckpointError as error:
        raise DataError(f"{folder}/{error}") from error


def token_text(config: dict[str, Any], key: str, folder: Path) -> str | None:
    """A special token is stored as a string, or as a mapping with its content."""
    value = config.get(key)
    text = value.get("content", 0) if isinstance(value, dict) else value
    if not isinstance(text, str | None):
        raise DataError(f"{folder / 'tokenizer_config.json'}: {key} must be a text, not {value!r}")
    return text
