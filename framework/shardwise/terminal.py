"""The one way to the terminal: without secrets where they may be, and without control characters.

What a model, a template, a file or a tensor's name says must not move the cursor, retitle the
window, turn the direction of text around or hide a part of it.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import IO

from shardwise.config.redact import redact

# C0 but tab and newline, DEL, C1, line and paragraph separators, marks that turn the direction of
# text or are invisible (joiners that words and emoji need excepted), halves of surrogate pairs,
# tags.
_CONTROL = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff"
)
_UNSAFE = re.compile(f"[{_CONTROL}]")
_UNSAFE_NAME = re.compile(f"[{_CONTROL}\t\n]")


def printable(text: str) -> str:
    """``text`` with control characters written out, as in ``\\x1b``; tab and newline stay."""
    return _UNSAFE.sub(_escaped, text.replace("\r\n", "\n"))


def one_line(name: object) -> str:
    """A name from elsewhere as a part of a line of ours, which it cannot end."""
    return _UNSAFE_NAME.sub(_escaped, str(name))


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def json_text(document: str) -> str:
    """A JSON document with the same characters as JSON's own escapes: the same data."""
    return _UNSAFE.sub(lambda m: "".join(f"\\u{u:04x}" for u in _utf16(m[0])), document)


def _utf16(char: str) -> list[int]:
    units = char.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2)]


def say(text: str, stream: IO[str] | None = None, *, secrets: bool = False) -> None:
    """Write ``text`` and a newline. ``secrets``: it may quote some, so it is redacted."""
    stream = sys.stdout if stream is None else stream
    shown = printable(redact(text) if secrets else text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=True)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))


def log_to_stderr() -> None:
    """Warnings of this process, in one form and as `say` writes."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("shardwise.data.unused").setLevel(logging.INFO)  # what was detected
