"""What stands beside a tokenizer: tokenizer_config.json and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardwise.errors import DataError


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of a folder (empty when absent), with chat_template.jinja read in."""
    config: dict[str, Any] = {}
    file = folder / "tokenizer_config.json"
    if file.exists():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not JSON: {error}") from error
        if not isinstance(config, dict):
            raise DataError(f"{file}: must hold a JSON object")
    template = folder / "chat_template.jinja"
    if template.exists():
        try:
            config["chat_template"] = template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{template}: byte {error.start}: not UTF-8") from error
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name: take the default one
        default = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = config["chat_template"] = default[0].get("template") if default else None
    if not isinstance(found, str | None):
        raise DataError(f"{file}: chat_template must be a text")
    return config


def token_text(config: dict[str, Any], key: str, folder: Path) -> str | None:
    """A special token is stored as a string, or as a mapping with its content."""
    value = config.get(key)
    text = value.get("content", 0) if isinstance(value, dict) else value
    if not isinstance(text, str | None):
        raise DataError(f"{folder / 'tokenizer_config.json'}: {key} must be a text, not {value!r}")
    return text
