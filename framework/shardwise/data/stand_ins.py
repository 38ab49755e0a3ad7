"""Little data in place of much: a user's own files where they are small, else seeded stand-ins."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shardwise.data.formats import CONVERSATIONS, DOCUMENTS
from shardwise.data.source import DataSource
from shardwise.errors import DataError, UserError

SMALL_DATA = 1 << 20  # bytes; a user's own files up to here are used as they are


def small_sources(
    sources: Sequence[DataSource],
    folder: Path,
    part: str,
    reads: Sequence[str] = DOCUMENTS,
    longest: int | None = None,
) -> list[DataSource]:
    """As many sources, with the same weights, in ``folder`` where the user's own will not do.

    ``part``: "train" or "validation", which hold other documents. ``reads``: the formats of their
    section. ``longest``: bytes that a line of a file may have, where longer rows are an error.
    """
    found = []
    for number, source in enumerate(_told(s, reads) for s in sources):
        if is_small(source, longest):
            found.append(source)
            continue
        kind = _stand_in(source, reads)
        rows = STAND_INS[kind](random.Random(f"{part} {number}"))
        file = folder / f"{kind}-{part}-{number}.jsonl"
        count = 160 if part == "train" else 27  # an odd number of rows: no ranks share them evenly
        lines = [json.dumps(row) for _, row in zip(range(count), rows)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        found.append(
            DataSource.model_validate({"kind": kind, "path": file, "weight": source.weight})
        )
    return found


def _told(source: DataSource, reads: Sequence[str]) -> DataSource:
    with contextlib.suppress(UserError, OSError):  # files that are elsewhere have a stand-in
        return source.told(reads)
    return source


def _stand_in(source: DataSource, reads: Sequence[str]) -> str:
    """The format of what stands in for a source: its own, or one that is read like it."""
    name = source.format
    if name in STAND_INS:
        return name
    if name in CONVERSATIONS:
        return "messages"
    return next(n for n in reads if n in STAND_INS)


def is_small(source: DataSource, longest: int | None = None) -> bool:
    """Whether a source's own files can be read whole, by a tokenizer of bytes."""
    if source.kind in ("stdlib", "indexed"):  # an indexed one has another tokenizer's tokens
        return False
    try:
        files = source.files()
        if not 0 < sum(f.stat().st_size for f in files) <= SMALL_DATA:
            return False
        return longest is None or all(len(row) <= longest for row in _lines(source))
    except (DataError, OSError):
        return False


def _lines(source: DataSource) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) for _, row in source.rows())


def _text(rng: random.Random, letters: str, least: int, most: int) -> str:
    return "".join(rng.choices(letters, k=rng.randint(least, most)))


def _documents(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Short documents: several to a packed row, some longer than one."""
    while True:
        length = rng.choice((3, 7, 11, 20, 45))
        yield {"text": _text(rng, "abcdefgh ", length, length)}


def _chats(rng: random.Random) -> Iterator[dict[str, Any]]:
    while True:
        asked, said = _text(rng, "abcd ", 2, 12), _text(rng, "wxyz ", 1, 12)
        roles = ("user", asked), ("assistant", said)
        yield {"messages": [{"role": role, "content": text} for role, text in roles]}


def _completions(rng: random.Random) -> Iterator[dict[str, Any]]:
    for chat in _chats(rng):
        asked, said = chat["messages"]
        yield {"prompt": asked["content"], "completion": said["content"]}


def _preferences(rng: random.Random) -> Iterator[dict[str, Any]]:
    while True:
        answers: dict[str, None] = {}  # of different words, or nothing would be preferred
        for number in range(rng.randint(2, 4), 0, -1):
            answers["wxyz"[number - 1] + _text(rng, "wxyz ", 0, 8)] = None
        yield {"prompt": _text(rng, "abcd ", 2, 9), "answers": list(answers)}


def _steps(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Some longer than a row: their last steps are cut off."""
    while True:
        steps = [_text(rng, "wxyz", 1, 16) for _ in range(rng.choice((1, 2, 3, 4, 16)))]
        labels = [rng.choice((0.0, 0.25, 1.0)) for _ in steps]
        yield {"prompt": _text(rng, "abcd ", 2, 9), "steps": steps, "labels": labels}


STAND_INS: dict[str, Callable[[random.Random], Iterator[dict[str, Any]]]] = {
    "documents": _documents,
    "messages": _chats,
    "prompt-completion": _completions,
    "preference": _preferences,
    "steps": _steps,
}
