"""How a run ended, for whoever starts it again: ``exit.json`` in the run's folder.

torchrun never passes a rank's exit code on, so a batch script reads it here. The history of ends is
in `attempts`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from shardwise import terminal
from shardwise.config.redact import redact
from shardwise.errors import ShardwiseError
from shardwise.resilience import attempts

EXIT_FILE = "exit.json"
TOLD_HERE = "this rank tells the user, though it is not rank 0"  # a note on an error
# What a rank says when it has merely lost another one.
CONSEQUENCE = re.compile(
    r"Connection (?:closed|reset|refused)|closed by peer|Broken pipe|NCCL.*remote|lost rank \d|"
    r"(?:gloo|ProcessGroup).*[Tt]imed? ?out|Application timeout caused pair closure"
)


def lost(ranks: Sequence[int]) -> str:
    """In words, that these ranks are gone; a consequence too."""
    names = ", ".join(map(str, ranks))
    return f"lost rank {names}, which ended first: killed, out of memory, or by its own message"


def write_ending(directory: Path, exit_code: int, reason: str, id: str = "") -> None:
    """Say how the run ended. A disk that cannot take it must not hide the end itself.

    ``id``: of the attempt (`attempts.end`).
    """
    if not directory.is_dir():  # it ended before it began
        return
    body = {"exit_code": int(exit_code), "reason": redact(reason), "time": round(time.time(), 3)}
    staged = directory / f"{EXIT_FILE}.{os.getpid()}.tmp"
    try:
        staged.write_text(json.dumps(body))
        staged.replace(directory / EXIT_FILE)
    except OSError as error:
        terminal.say(f"{directory / EXIT_FILE}: {error}", sys.stderr)
    attempts.end(directory, exit_code, reason, id)


def clear_ending(directory: Path) -> None:
    """A run that goes on has not ended."""
    (directory / EXIT_FILE).unlink(missing_ok=True)


def _say(error: ShardwiseError) -> None:
    if os.environ.get("RANK", "0") == "0" or TOLD_HERE in getattr(error, "__notes__", ()):
        terminal.say(str(error), sys.stderr, secrets=True)


# How this process's last words reach its user when its main thread cannot say them.
last_words: Callable[[ShardwiseError], object] = _say


def leave(error: ShardwiseError) -> NoReturn:
    """End this process from any thread, whatever its main thread does."""
    try:
        last_words(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(error.exit_code)
