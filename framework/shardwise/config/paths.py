"""What a path in a recipe may stand for: one rule, wherever a path is written."""

from __future__ import annotations

import os
import re
from pathlib import Path

from shardwise.errors import UserError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

_PATH_BYTES, _NAME_BYTES = 4096, 255  # Linux: PATH_MAX, and NAME_MAX of its file systems


def expand(path: Path | str) -> Path:
    """``~`` at the beginning is a home folder, ``${NAME}`` an environment variable.

    Nothing else has a meaning: not ``$NAME`` without braces, nor, for a name that exists, a ``*``.
    Raises UserError for a variable that is not set, a user who is not there, and what can be no
    name of a file.
    """
    text = os.fspath(path)

    def value(match: re.Match[str]) -> str:
        if not (found := os.environ.get(match[1])):
            raise UserError(f"{text}: the environment variable {match[1]} is not set")
        return found

    text = _VARIABLE.sub(value, text)
    _check(text)
    if not text.startswith("~"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {error}") from error


def _check(text: str) -> None:
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise UserError(f"{text!r} can be no path: {error}") from None
    if b"\0" in raw:
        raise UserError(f"{text!r} can be no path: it holds a zero byte")
    if len(raw) >= _PATH_BYTES or max(map(len, raw.split(b"/"))) > _NAME_BYTES:
        raise UserError(
            f"{text[:60]}... can be no path: a path has under {_PATH_BYTES} bytes, each name in it "
            f"at most {_NAME_BYTES}"
        )
