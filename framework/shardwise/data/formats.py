"""What rows of data mean, by the names that others use, and how it is told from the rows.

| format | columns of a row |
|---|---|
| ``text`` | none: each file is one document |
| ``documents`` | text |
| ``messages`` | messages: a list of {role, content} (OpenAI, TRL); tools, documents |
| ``sharegpt`` | conversations: a list of {from, value}; system, tools |
| ``alpaca`` | instruction, output; input, system, history |
| ``prompt-completion`` | prompt and completion, each a text or messages |
| ``preference`` | chosen and rejected (or answers, or completion and label); prompt |
| ``steps`` | prompt, steps (a list of texts, or one text) and labels (a number a step); \
or prompt, completion, spans (of characters) and labels |
| ``problems`` | prompt and answer; all else goes to the verifier |

A format is a way to write what `conversation` and `preferences` read (`conversions`).
``columns: {prompt: question}`` in a source says that a column has another name than ours.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shardwise import hub
from shardwise.config.explain import nearest
from shardwise.data import files as data_files
from shardwise.data import folders, readers
from shardwise.data.streams import MAX_EXPANSION, suffix_of
from shardwise.errors import DataError

SAMPLE = 64  # rows from which a format is told


class Format(NamedTuple):
    """``needed``: column sets, one of which a row must have; ``more``: what else it may have."""

    needed: tuple[tuple[str, ...], ...]
    more: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()  # names inside of the messages of its first column

    @property
    def columns(self) -> tuple[str, ...]:
        """All of its columns, ours by name."""
        return tuple(dict.fromkeys((*itertools.chain(*self.needed), *self.more, *self.inner)))

    def columns_hold(self, columns: Mapping[str, str]) -> bool:
        """Whether a mapping is of columns that it has."""
        return set(self.columns).issuperset(columns)


_ROW = ("tools", "documents", "chat_template_kwargs")
# In the order in which they are tried: what asks for more comes first.
FORMATS: dict[str, Format] = {
    "preference": Format(
        (("chosen", "rejected"), ("answers",), ("prompt", "completion", "label")),
        ("ratings", "margin", "system", *_ROW),
    ),
    "steps": Format(
        (("prompt", "steps", "labels"), ("prompt", "completion", "spans", "labels")),
        ("system", *_ROW),
    ),
    "messages": Format((("messages",),), _ROW, ("role", "content")),
    "sharegpt": Format((("conversations",),), ("system", *_ROW), ("from", "value")),
    "prompt-completion": Format((("prompt", "completion"),), ("system", *_ROW)),
    "alpaca": Format((("instruction", "output"),), ("input", "system", "history")),
    "problems": Format((("prompt", "answer"),), ("system",)),
    "documents": Format((("text",),)),
    "text": Format(()),
}
CONVERSATIONS = ("messages", "sharegpt", "prompt-completion", "alpaca")
DOCUMENTS = ("documents", "text")
PREFERENCES = ("preference",)
PROBLEMS = ("problems",)
STEPS = ("steps",)

# What others call a column; a mapping is offered where a format cannot be told.
_OTHERS = {
    "text": ("content", "body", "document", "raw_content", "article", "story", "code"),
    "prompt": ("question", "problem", "query", "instruction", "input", "context", "user"),
    "completion": ("response", "answer", "output", "solution", "target", "assistant", "reply"),
    "answer": ("ground_truth", "final_answer", "expected_answer", "solution", "target", "label"),
    "chosen": ("chosen_response", "preferred", "accepted", "better", "winner", "good"),
    "rejected": ("rejected_response", "dispreferred", "worse", "loser", "bad"),
    "messages": ("conversation", "dialog", "dialogue", "turns", "chat", "conversations"),
    "conversations": ("conversation", "dialog", "dialogue", "turns", "chat"),
    "instruction": ("question", "prompt", "query", "task"),
    "steps": ("completions", "solution_steps", "completion", "response", "solution"),
    "labels": ("label", "ratings", "scores", "step_labels"),
    "output": ("response", "answer", "completion", "target"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Detected:
    """What a file, a folder or a name on the hub holds.

    ``format``: a key of `FORMATS`. ``columns``: the mapping that its rows need ({ours: theirs};
    empty: they have our names). ``seen``: the columns of its first rows. ``container``: text,
    jsonl, json, parquet or arrow. ``detail``: what it was told by.
    """

    format: str
    columns: dict[str, str]
    seen: tuple[str, ...]
    container: str
    detail: str
    files: tuple[Path, ...]
    rows: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)  # the first ones

    def num_rows(self, max_expansion: float = MAX_EXPANSION) -> int:
        """Rows of all its files (``text``: files); reads them once."""
        if self.format == "text":
            return len(self.files)
        return sum(readers.count_rows(f, max_expansion) for f in self.files)

    def describe(self, path: Path | str, num_rows: int) -> str:
        """One line for a log."""
        unit = "files" if self.format == "text" else "rows"
        mapped = "".join(f", {ours}: {theirs}" for ours, theirs in self.columns.items())
        return f"{path}: detected {self.format} ({self.detail}{mapped}), {num_rows:,} {unit}"


def detect(
    path: Path | str,
    among: Collection[str] = tuple(FORMATS),
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    subset: str | None = None,
    max_expansion: float = MAX_EXPANSION,
) -> Detected:
    """Which format of ``among`` a file, a folder, a glob or ``hf:org/name`` has.

    Told from the first `SAMPLE` rows, whose columns ``columns`` renames ({ours: theirs}). Raises
    DataError where it cannot be told: the message has the columns seen, the formats that are near
    and the mapping that would mend it.
    """
    if files := _texts(path):
        if "text" not in among:
            raise DataError(
                f"{path}: holds plain text, no rows (of {'/'.join(readers.ROW_SUFFIXES)}); read "
                f"here: {', '.join(among)}"
            )
        return Detected("text", {}, (), "text", "each file a document", tuple(files), ())
    files = folders.row_files(path, split, subset)
    rows = [row for _, row in itertools.islice(readers.read_rows(files[:1], max_expansion), SAMPLE)]
    seen = tuple(dict.fromkeys(name for row in rows for name in row))
    renamed = [rename(row, columns or {}) for row in rows]
    container = suffix_of(files[0]).removeprefix(".") or "jsonl"
    fits = {name: told for name in FORMATS if (told := _told(name, renamed)) is not None}
    for name, (mapped, detail) in fits.items():
        if name in among and FORMATS[name].columns_hold(columns or {}):
            return Detected(name, mapped, seen, container, detail, tuple(files), tuple(rows))
    raise DataError(f"{path}: {_near(seen, fits, among, columns or {})}")


def _texts(path: Path | str) -> list[Path]:
    """The files of a path that holds text and no rows."""
    place = hub.local_folder(path, kind="dataset")
    if not place.exists() and "*" not in place.name:
        return []  # whoever reads rows says what is missing
    found = data_files.find_files(place)
    kinds = {suffix_of(f) for f in found if f.name not in folders.ABOUT}
    if kinds & {*readers.ROW_SUFFIXES} == {".json"} and kinds - {".json", ".md", ""}:
        raise DataError(
            f"{path}: holds .json files among others; write kind: text if each file is a document, "
            "or name those with rows by a glob (*.json)"
        )
    return [] if kinds & {*readers.ROW_SUFFIXES} else found


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with our names in place of theirs; ``columns`` is {ours: theirs}."""
    ours = {theirs: name for name, theirs in columns.items()}
    return {ours.get(name, name): value for name, value in row.items()}


def _told(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], str] | None:
    """The columns that need mapping, and what a format is told by; None: the rows have another."""
    present = {k for row in rows for k, v in row.items() if v not in (None, [], {})}
    if name in ("messages", "sharegpt"):
        inner = FORMATS[name].inner
        lists = [c for c in sorted(present) if all(_holds(row.get(c), inner[0]) for row in rows)]
        main = FORMATS[name].needed[0][0]
        if name == "messages":  # of a preference, they say one answer only
            lists = [c for c in lists if c not in ("prompt", "completion", "chosen", "rejected")]
        found = [main] if main in lists else lists
        if len(found) != 1:
            return None
        mapped = {} if found == [main] else {main: found[0]}
        return mapped, f"{found[0]}: {'/'.join(inner)}"
    for needed in FORMATS[name].needed:
        if present.issuperset(needed) and all(_is_said(row.get(c)) for row in rows for c in needed):
            return {}, ", ".join(needed)
    return None


def _holds(value: Any, key: str) -> bool:
    """Whether a value is a list of objects with a key, as a conversation is."""
    return isinstance(value, list) and all(isinstance(m, Mapping) and key in m for m in value)


def _is_said(value: Any) -> bool:
    return value is None or isinstance(value, str | list | Mapping | bool | int | float)


def _near(
    seen: Sequence[str],
    fits: Collection[str],
    among: Collection[str],
    columns: Mapping[str, str],
) -> str:
    """Why no format fits, with what would."""
    strange = [f"columns.{k}: no column {v!r}{_like(v, seen)}"
               for k, v in columns.items() if v not in seen]  # fmt: skip
    if strange:
        return "; ".join(strange)
    text = f"its format cannot be told from its columns ({', '.join(seen) or 'none'})"
    if fits:
        text = f"its rows are of the format {next(iter(fits))}, which is not read here"
        if {*fits} & {*CONVERSATIONS} and {*among} == {*DOCUMENTS}:
            text += (
                f"; to have them written out by the chat template, write kind: {next(iter(fits))}"
            )
    offers = []
    for name in (n for n in FORMATS if n in among):
        for needed in FORMATS[name].needed:
            mapping = _mapping(needed, seen)
            if mapping is None:
                continue
            said = ", ".join(f"{k}: {v}" for k, v in mapping.items())
            mend = f"columns: {{{said}}}" if said else "no mapping, but other values"
            offers.append(f"{name} with {mend}")
    if offers:
        return f"{text}; near: {'; '.join(offers[:3])}"
    wanted = "; ".join(
        f"{n}: {' or '.join(' and '.join(c) for c in FORMATS[n].needed)}"
        for n in FORMATS
        if n in among and FORMATS[n].needed
    )
    return f"{text}; read here: {wanted}. Map them with columns: {{ours: theirs}}, or name the kind"


def _like(name: str, known: Collection[str]) -> str:
    found = nearest(name, known)
    return f"{found} (columns: {', '.join(known)})" if found else f"; columns: {', '.join(known)}"


def _mapping(needed: Sequence[str], seen: Sequence[str]) -> dict[str, str] | None:
    """{ours: theirs} for the columns that have another name; None where one has no likely name."""
    found: dict[str, str] = {}
    for ours in needed:
        if ours in seen:
            continue
        likely = (o for o in _OTHERS.get(ours, ()) if o in seen and o not in found.values())
        if (theirs := next(likely, None)) is None:
            return None
        found[ours] = theirs
    return found


class Renaming:
    """Gives the columns of a source's rows our names, and finds out whether each was ever there."""

    def __init__(
        self, path: Path, name: str, columns: Mapping[str, str], ignore: Collection[str] = ()
    ) -> None:
        self.path, self.ignore = path, ignore
        form = FORMATS[name]
        self.needed = set(itertools.chain(*form.needed))
        self.main = form.needed[0][0] if form.needed else ""
        self.inner = {k: v for k, v in columns.items() if k in form.inner}
        self.outer = {k: v for k, v in columns.items() if k not in form.inner}
        self.seen: dict[str, None] = {}

    def rows(
        self, rows: Iterator[tuple[str, dict[str, Any]]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row under our names, without what is ignored.

        Raises DataError for a column that no row has, or that another one hides.
        """
        for where, row in rows:
            kept = {k: v for k, v in row.items() if k not in self.ignore}
            self.seen |= dict.fromkeys(kept)
            for ours, theirs in self.outer.items():
                if theirs not in self.seen and ours in self.needed:
                    raise DataError(f"{where}: {self._unknown(ours, theirs)}")
                if ours in kept and ours != theirs and ours not in self.outer.values():
                    raise DataError(
                        f"{where}: columns.{ours}: {theirs}, and the row has a column {ours!r} of "
                        "its own; list that under the source's ignore"
                    )
            yield where, self._inside(rename(kept, self.outer))
        for ours, theirs in (self.outer | self.inner).items():
            if theirs not in self.seen:
                raise DataError(f"{self.path}: {self._unknown(ours, theirs)}")

    def _unknown(self, ours: str, theirs: str) -> str:
        return f"columns.{ours}: no column {theirs!r}{_like(theirs, self.seen)}"

    def _inside(self, row: dict[str, Any]) -> dict[str, Any]:
        messages = row.get(self.main)
        if self.inner and isinstance(messages, list):
            self.seen |= {k: None for m in messages if isinstance(m, Mapping) for k in m}
            row[self.main] = [
                rename(m, self.inner) if isinstance(m, Mapping) else m for m in messages
            ]
        return row
