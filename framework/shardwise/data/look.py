"""What files of rows hold: their format, their columns, and some rows as they are learned."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shardwise.data import formats, readers
from shardwise.data.config import Reading, StepReading
from shardwise.data.datasets import chat_examples
from shardwise.data.preferences import read_rankings
from shardwise.data.source import DataSource
from shardwise.data.steps import read_solutions
from shardwise.data.tokenizer import Tokenizer

Piece = tuple[str, bool]  # a text, and whether it is learned
_CHARACTERS = 2000  # of a document that is shown


@dataclasses.dataclass(frozen=True)
class RowSample:
    """One row as text, in pieces that are learned or not; of preferences, one for each answer."""

    where: str
    pieces: list[Piece]


@dataclasses.dataclass(frozen=True)
class RowsReport:
    """What `look` found. ``columns``: ours by theirs where they differ; ``seen``: the rows' own."""

    path: str
    format: str
    container: str
    told_by: str
    columns: dict[str, str]
    seen: tuple[str, ...]
    num_files: int
    num_rows: int
    samples: list[RowSample]


def look(
    path: Path | str,
    tokenizer: Tokenizer,
    *,
    kind: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    subset: str | None = None,
    raw: bool = False,
    num_samples: int = 3,
) -> RowsReport:
    """Tell the format of a file, a folder, a glob or ``hf:org/name``, and write out some rows.

    Conversations and preferences are written by the template of ``tokenizer`` (``raw``: plain
    texts stand as they are), with what is learned of them. Raises DataError where the format
    cannot be told, with the mapping of columns that would mend it, or a row cannot be read.
    """
    among = tuple(formats.FORMATS) if kind == "auto" else (kind,)
    found = formats.detect(path, among, columns=columns, split=split, subset=subset)
    mapped = {**found.columns, **(columns or {})}
    samples: Iterator[RowSample]
    if found.format == "problems":
        rows = formats.Renaming(Path(path), "problems", mapped).rows(readers.read_rows(found.files))
        samples = (RowSample(where, [(_shown(row), False)]) for where, row in rows)
    else:
        settings = {"kind": found.format, "path": Path(path), "columns": mapped}
        if found.format != "text":
            settings |= {"split": split, "subset": subset}
        samples = _samples(DataSource.model_validate(settings), tokenizer, raw)
    return RowsReport(
        str(path),
        found.format,
        found.container,
        found.detail,
        mapped,
        found.seen,
        len(found.files),
        found.num_rows(),
        list(itertools.islice(samples, num_samples)),
    )


def _shown(row: Mapping[str, object]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)


def _samples(source: DataSource, tokenizer: Tokenizer, raw: bool) -> Iterator[RowSample]:
    if source.format in formats.CONVERSATIONS:
        for example in chat_examples(source, tokenizer, texts="raw" if raw else "chat"):
            pieces = _pieces(example.ids, example.loss_mask, tokenizer)
            yield RowSample(example.where, pieces)
    elif source.format in formats.PREFERENCES:
        how = Reading(raw=raw, unpaired=True)
        for i, ranking in enumerate(read_rankings([source], tokenizer, how)):
            for answer, rating in zip(ranking.answers, ranking.ratings, strict=True):
                mask = [False] * len(ranking.prompt) + [True] * len(answer)
                pieces = _pieces([*ranking.prompt, *answer], mask, tokenizer)
                yield RowSample(f"ranking {i}, rated {rating:g}", pieces)
    elif source.format in formats.STEPS:
        for i, solution in enumerate(read_solutions([source], tokenizer, StepReading())):
            ids = [*solution.prompt, *solution.answer]
            ends = {len(solution.prompt) + end for end in solution.ends}
            mask = [n in ends for n in range(len(ids))]
            said = ", ".join(f"{label:g}" for label in solution.labels)
            yield RowSample(f"solution {i}, labels {said}", _pieces(ids, mask, tokenizer))
    else:
        for document in source.documents():
            yield RowSample(document.name, [(document.text[:_CHARACTERS], True)])


def _pieces(ids: Sequence[int], mask: Sequence[bool], tokenizer: Tokenizer) -> list[Piece]:
    parts = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1]))
    return [
        (tokenizer.decode([i for i, _ in part], skip_special=False), learned)
        for learned, part in parts
    ]
