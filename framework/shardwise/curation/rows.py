"""Rows as the rules see them: the text that is asked, the answers, and all else as it came."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from shardwise.curation import words
from shardwise.data.conversions import as_conversation, from_sharegpt
from shardwise.data.formats import CONVERSATIONS, PREFERENCES, PROBLEMS, STEPS
from shardwise.data.source import DataSource
from shardwise.errors import DataError

FILTERED = (*CONVERSATIONS, *PREFERENCES, *STEPS, *PROBLEMS)


@dataclass(frozen=True)
class Row:
    """A row of one of `FILTERED`. ``data`` is what the source has and what is written again.

    ``prompt``: the words of all that is asked, without a system message. ``answers``: of
    preferences the best first; of problems the reference. ``steps``: of rows of steps.
    """

    where: str
    format: str
    data: Mapping[str, Any]
    prompt: str
    answers: tuple[str, ...]
    steps: tuple[str, ...] | None = None

    @functools.cached_property
    def prompt_key(self) -> str:
        """The prompt in its normal form: equal for prompts of equal words and symbols."""
        return words.normal(self.prompt)

    @property
    def answer(self) -> str:
        """The best answer."""
        return self.answers[0]

    def texts(self, of: str) -> tuple[str, ...]:
        """The texts that a rule looks at: of the ``answer``, the ``prompt``, or the ``row``."""
        prompt = (self.prompt,) if of != "answer" else ()
        return (*prompt, *self.answers) if of != "prompt" else prompt

    def field(self, path: str) -> Any:
        """The value of a field, None where there is none; a dot leads into an object."""
        value: Any = self.data
        for name in (path,) if path in self.data else path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def score(self, path: str) -> float | None:
        """A field as a number; None for what is missing or not finite, as NaN is."""
        value = self.field(path)
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
        return None

    def rank(self, score_field: str, seed: int) -> tuple[float, str]:
        """Ascending from the best row to the worst; ties by a seeded hash of all of its content."""
        score = self.score(score_field)
        return math.inf if score is None else -score, self._digest(seed)

    def _digest(self, seed: int) -> str:
        said = json.dumps(self.data, sort_keys=True, ensure_ascii=False)
        return xxhash.xxh3_128_hexdigest(f"{seed}|{said}".encode())


def read_source(source: DataSource) -> Iterator[Row]:
    """The rows of a source, under our names of its columns; all of their fields are kept.

    Raises DataError with file and row for what is no row of its format.
    """
    told = source.told(FILTERED)
    for where, data in told.rows():
        yield row_of(told.format, data, where)


def row_of(format: str, data: Mapping[str, Any], where: str = "") -> Row:
    """A row of a format of `FILTERED`; DataError with its place for what is none.

    The row itself keeps the file's name alone, so that a report is the same wherever a run lies.
    """
    steps = None
    try:
        if format in PREFERENCES:
            prompt, answers = _preference(data)
        elif format in STEPS:
            steps = _steps(data)
            prompt, answers = _text(data, "prompt"), ("\n".join(steps),)
        elif format in PROBLEMS:
            prompt, answers = _text(data, "prompt"), (_reference(data),)
        else:
            prompt, answers = _conversation(format, data)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return Row(where.rpartition("/")[2], format, data, prompt, answers, steps)


def _preference(data: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """(prompt, answers from the best to the worst); an implicit prompt is what all begin with."""
    if isinstance(listed := data.get("answers"), list) and listed:
        ratings = data.get("ratings") or range(len(listed), 0, -1)
        given = [listed[i] for _, i in sorted((-r, i) for i, r in enumerate(ratings))]
    else:
        given = [data[k] for k in ("chosen", "rejected", "completion") if data.get(k) is not None]
    if not given:
        raise DataError("give 'chosen' and 'rejected', 'answers', or 'completion' and 'label'")
    if "prompt" not in data and all(isinstance(a, list) for a in given):
        shared = next(
            (n for n, turns in enumerate(zip(*given)) if any(t != turns[0] for t in turns)), 0
        )
        return _said(given[0][:shared], "chosen"), tuple(_said(a[shared:], "chosen") for a in given)
    return _text(data, "prompt"), tuple(_said(a, "chosen") for a in given)


def _conversation(format: str, data: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """(all before the last assistant's turn, that turn)."""
    row = as_conversation(format, data)
    if "completion" in row:
        return _said(row["prompt"], "prompt"), (_said(row["completion"], "completion"),)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("field 'messages' is no list of messages")
    roles = [m.get("role") if isinstance(m, Mapping) else None for m in messages]
    if "assistant" not in roles:
        raise DataError("the conversation has no assistant turn to learn")
    last = len(roles) - 1 - roles[::-1].index("assistant")
    return _said(messages[:last], "messages"), (_said([messages[last]], "messages"),)


def _steps(data: Mapping[str, Any]) -> tuple[str, ...]:
    steps = data.get("steps")
    if isinstance(steps, str):
        return tuple(lines(steps))
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise DataError("field 'steps' is neither a text nor a list of texts")
    return tuple(steps)


def lines(text: str) -> list[str]:
    """The lines that are not blank: a text's steps."""
    return [line for line in text.splitlines() if line.strip()]


def _reference(data: Mapping[str, Any]) -> str:
    return "\n".join(references(data.get("answer")))


def references(value: Any) -> list[str]:
    """A reference answer, or several that are as right, as texts; none where there is none."""
    given = value if isinstance(value, list) else [value]
    return [v if isinstance(v, str) else json.dumps(v) for v in given if v is not None]


def _text(data: Mapping[str, Any], name: str) -> str:
    if data.get(name) is None:
        raise DataError(f"field {name!r} is missing; fields: {', '.join(sorted(data)) or 'none'}")
    return _said(data[name], name)


def _said(value: Any, name: str) -> str:
    """A text, or the contents of messages but for a system's."""
    if isinstance(value, str):
        return value
    messages = from_sharegpt(value)
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise DataError(f"field {name!r} is neither a text nor a list of messages")
    return "\n\n".join(_content(m) for m in messages if m.get("role") != "system")


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
