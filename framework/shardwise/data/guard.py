"""A bound on what a stranger's tokenizer may do: its regexes can search for hours.

A pattern of a ``tokenizer.json`` is matched by backtracking, which takes exponential time for some
patterns and texts, and a normalizer can make a book of a letter. Tokenizers whose patterns are not
known to be harmless therefore run in a thread that is given a time, and those that could blow text
up are refused when they are read.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from shardwise.errors import DataError

SECONDS = 60.0  # for a text, or a batch of about a million characters
MAX_GROWTH = 1024  # characters that a normalizer may make of one
T = TypeVar("T")


def patterns(spec: Any) -> Iterator[str]:
    """Every regular expression of a tokenizer.json."""
    if isinstance(spec, dict):
        if isinstance(spec.get("Regex"), str):
            yield spec["Regex"]
        for value in spec.values():
            yield from patterns(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from patterns(value)


def needs_bound(text: str, harmless: frozenset[str]) -> bool:
    """Whether a tokenizer.json has patterns that we do not know.

    Raises DataError for a normalizer that could blow text up, and for a decoder that searches.
    """
    spec = {k: v for k, v in json.loads(text).items() if k not in ("model", "added_tokens")}
    growth = _growth(spec.get("normalizer"))
    if growth > MAX_GROWTH:
        raise DataError(f"its normalizer may make {growth:,} characters of one, as a bomb would")
    if not harmless.issuperset(patterns(spec.get("decoder"))):
        raise DataError("its decoder searches by a regular expression, which cannot be bounded")
    return not harmless.issuperset(patterns(spec))


def _growth(step: Any) -> int:
    """An upper bound of the characters that a normalizer's step makes of one."""
    if not isinstance(step, dict):
        return 1
    if step.get("type") == "Sequence":
        total = 1
        for inner in step.get("normalizers") or []:
            total *= _growth(inner)
        return total
    if step.get("type") == "Prepend":
        return 1 + len(step.get("prepend") or "") // 64  # once a text
    if step.get("type") != "Replace":
        return 1
    pattern, content = step.get("pattern") or {}, step.get("content") or ""
    if "String" in pattern:
        return max(1, -(-len(content) // max(1, len(pattern["String"]))))
    try:
        kept = 1 if re.search(pattern.get("Regex", ""), "") else 0  # also between characters
    except (re.error, RecursionError):
        kept = 1
    return max(1, len(content) + kept)


def bounded(work: Callable[[], T], what: str) -> T:
    """``work()`` in a thread, or DataError when it takes longer than `SECONDS` or panics.

    The thread cannot be ended; it goes on until the process, which has its error, is.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # Rust's panic derives from nothing else
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if failed:
        if isinstance(failed[0], Exception):
            raise failed[0]
        raise DataError(f"the tokenizer's regular expressions fail on {what}: {failed[0]}")
    if not done:
        raise DataError(
            f"the tokenizer's regular expressions take more than {SECONDS:g} s for {what}; they "
            "backtrack without end; take another tokenizer"
        )
    return done[0]
