"""What a path in a recipe may stand for: one rule, wherever a path is written."""

from __future__ import annotations

import os
import re
from pathlib import Path

from shardwise.errors import UserError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def expand(path: Path | str) -> Path:
    """``~`` at the beginning is a home folder, ``${NAME}`` an environment variable.

    Nothing else has a meaning: not ``$NAME`` without braces, nor, for a name that exists, a ``*``.
    Raises UserError for a variable that is not set, and a user who is not there.
    """
    text = os.fspath(path)

    def value(match: re.Match[str]) -> str:
        if not (found := os.environ.get(match[1])):
            raise UserError(f"{text}: the environment variable {match[1]} is not set")
        return found

    text = _VARIABLE.sub(value, text)
    if not text.startswith("~"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {error}") from error
