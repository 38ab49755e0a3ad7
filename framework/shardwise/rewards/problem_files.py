"""Problems of the user's own, read from rows of data (`data.formats`, format ``problems``)."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import xxhash

from shardwise.config.explain import nearest
from shardwise.data import folders, formats, readers
from shardwise.data.conversation import MEDIA, check_messages
from shardwise.data.conversions import from_sharegpt
from shardwise.data.left_out import AGAIN, leave_out
from shardwise.data.parts import Part
from shardwise.data.unused import say_once, warn_once
from shardwise.errors import DataError
from shardwise.rewards.families import Problem

_COLUMNS = formats.FORMATS["problems"].columns
_REFUSED = {
    **dict.fromkeys(("images", "image", "videos", "video", "audio", "audios"), MEDIA),
    **dict.fromkeys(
        ("tools", "documents"), "a prompt is written without; leave them out of the rows"
    ),
}


class FileTask(Protocol):
    """What is read of a `task_configs.FileTaskConfig`."""

    @property
    def file(self) -> Path: ...
    @property
    def columns(self) -> dict[str, str]: ...
    @property
    def split(self) -> str: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def held_out(self) -> float | Path: ...
    @property
    def answer_after(self) -> str | None: ...
    @property
    def ignore(self) -> list[str]: ...
    @property
    def max_expansion(self) -> float: ...


def check_columns(config: FileTask) -> None:
    """Raise ValueError for a mapping of a column that problems have not."""
    for ours in config.columns:
        if ours not in _COLUMNS:
            near = nearest(ours, _COLUMNS)
            raise ValueError(
                f"columns.{ours}: no column of ours{near}; known: {', '.join(_COLUMNS)} (all else "
                "reaches the verifier under its own name)"
            )


def read_splits(config: FileTask) -> tuple[list[Problem], list[Problem]]:
    """(what is trained on, what is held out), each prompt in one of them and there once.

    Raises DataError with the file, the row and the mend: for rows that are no problems, prompts
    in both parts, and a part without any.
    """
    every = _read(config, config.file, config.split)
    if not isinstance(config.held_out, Path):
        share = config.held_out
        train, held_out = (
            [p for p in every if Part(share, side).has(_messages(p))] for side in (False, True)
        )
        none = share < 1.0 and not train, share > 0.0 and not held_out
        part = "trained on" if none[0] else "held out" if none[1] else ""
        if part:
            raise DataError(
                f"{config.file}: held_out {share:g} of {len(every)} problems leaves none to be "
                f"{part}; give another share, or a file of its own"
            )
        return train, held_out
    name = str(config.held_out)
    if name in folders.splits_of(config.file, config.subset) and name != config.split:
        held_out = _read(config, config.file, name)
    else:
        held_out = _read(config, config.held_out, "train")
    _refuse_overlap(every, held_out)
    return every, held_out


def _refuse_overlap(train: Sequence[Problem], held_out: Sequence[Problem]) -> None:
    places = {_asked(p): p.id for p in train}
    both = [p for p in held_out if _asked(p) in places]
    if both:
        raise DataError(
            f"{both[0].id}: asks what {places[_asked(both[0])]} asks, which is trained on; so do "
            f"{len(both)} of {len(held_out)} held-out problems: take them out of one file, or give "
            "held_out a share of one"
        )


def contents_hash(config: FileTask) -> str:
    """xxh3-128 of all problems, of both parts and in order; where a file lies does not count."""
    said = [[p._replace(id="") for p in part] for part in read_splits(config)]
    return xxhash.xxh3_128_hexdigest(json.dumps(said).encode())


def _messages(problem: Problem) -> list[Any]:
    """What is asked, as a row of messages that asks it has it: both are on one side."""
    return [*(problem.messages or [{"role": "user", "content": problem.question}])]


def _asked(problem: Problem) -> str:
    """A prompt as a text that no other prompt has."""
    return json.dumps(_messages(problem))


def _read(config: FileTask, path: Path, split: str) -> list[Problem]:
    """Every problem of one split of a data set, duplicates left out and counted."""
    found = formats.detect(
        path,
        formats.PROBLEMS,
        columns=config.columns,
        split=split,
        subset=config.subset,
        max_expansion=config.max_expansion,
    )
    rows = readers.read_rows(found.files, config.max_expansion)
    renaming = formats.Renaming(path, "problems", config.columns, config.ignore)
    problems: dict[str, Problem] = {}
    again: Counter[str] = Counter()
    for where, row in renaming.rows(rows):
        try:
            problem = _problem(row, where.rpartition("/")[2], config.answer_after)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        first = problems.setdefault(_asked(problem), problem)
        if first is problem:
            continue
        if (first.answer, first.others) != (problem.answer, problem.others):
            raise DataError(
                f"{where}: asks what {first.id} asks, and has another answer ({problem.answer!r}, "
                f"there {first.answer!r}); drop one, or give one row a list of answers"
            )
        again[first.id] += 1
        leave_out(AGAIN, where)
    say_once(found.describe(path, len(problems) + again.total()))
    if again:
        warn_once(
            f"{path}: {again.total()} rows ask what an earlier one asks and are left out, first "
            f"that of {next(iter(again))}"
        )
    return list(problems.values())


def _problem(row: Mapping[str, Any], id_: str, mark: str | None) -> Problem:
    said = {k: v for k, v in row.items() if v is not None}
    for name, why in _REFUSED.items():
        if said.get(name) not in (None, [], {}):
            raise DataError(f"field {name!r} cannot be used: {why}, or list it under the task's "
                            "ignore")  # fmt: skip
    question, messages = _prompt(said.pop("prompt", None), said.pop("system", None))
    if "answer" not in said:
        raise DataError(f"field 'answer' is missing; fields: {', '.join(sorted(row)) or 'none'}")
    given = said.pop("answer")
    answers = [_answer(a) for a in (given if isinstance(given, list) else [given])]
    if not answers:
        raise DataError("field 'answer' is an empty list; a problem needs an answer")
    if mark is not None:
        parts = [a.rpartition(mark) for a in answers]
        if any(not found or not after.strip() for _, found, after in parts):
            raise DataError(f"field 'answer' has nothing behind {mark!r} (answer_after)")
        said.setdefault("steps", parts[0][0].strip())
        answers = [after.strip() for _, _, after in parts]
    first, *others = dict.fromkeys(answers)
    return Problem(id_, question, first, _plain(said), messages, tuple(others))


def _prompt(prompt: Any, system: Any) -> tuple[str, list[dict[str, Any]] | None]:
    """The question as one text, and its messages where it is more than that."""
    if system is not None and not isinstance(system, str):
        raise DataError("field 'system' is not a text")
    first = [{"role": "system", "content": system}] if system else []
    if isinstance(prompt, str) and prompt.strip():
        asked = {"role": "user", "content": prompt}
        return prompt, [*first, asked] if first else None
    if not isinstance(prompt, list):
        raise DataError("field 'prompt' is neither a text nor a list of messages")
    messages = [*first, *check_messages(from_sharegpt(prompt))]
    if messages[-1]["role"] == "assistant":
        raise DataError("field 'prompt' ends with the assistant's message; nothing is asked")
    if [m["role"] for m in messages] == ["user"] and isinstance(messages[0]["content"], str):
        return messages[0]["content"], None
    texts = (f"{m['role']}: {_content(m)}" for m in messages)
    return "\n\n".join(texts), messages


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _answer(value: Any) -> str:
    """An answer as a text; a whole number has no point."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and math.isfinite(value):
        return str(int(value)) if value == int(value) else repr(value)
    if isinstance(value, str) and value.strip():
        return value
    raise DataError(f"field 'answer' is {value!r}; an answer is a text or a number, or a list")


def _plain(said: dict[str, Any]) -> dict[str, Any]:
    """What reaches the verifier: plain JSON."""
    for name, value in said.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"field {name!r} cannot reach the verifier: {error}; write it as a text, or list "
                "it under the task's ignore"
            ) from error
    return said


def write_stand_in(folder: Path) -> Path:
    """A file of seeded problems, a quarter of which can be held out, for what needs no others."""
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in _stand_ins()), encoding="utf-8")
    return file


def _stand_ins() -> Iterator[dict[str, Any]]:
    rng = random.Random("problems")
    for number in range(120):
        letters = "".join(rng.choices("abcd ", k=rng.randint(2, 9)))
        yield {
            "prompt": f"{number} {letters}",
            "answer": rng.choice(["w", "x", "yz", 7]),
            "steps": letters[::-1],
        }
