"""How long the data are in a model's tokens: of all rows, or of some that are spread evenly."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydantic import PrivateAttr

from shardwise.data.chat import encode_chat
from shardwise.data.config import Reading
from shardwise.data.datasets import build_chat_examples
from shardwise.data.parts import draw
from shardwise.data.preferences import read_rankings
from shardwise.data.readers import Document
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import Tokenizer
from shardwise.rewards import FileTaskConfig, prompt_messages

SAMPLE = 2000  # rows; a template is rendered for each in a process of its own, 1,000 or so a second
HEAD = 1 << 16  # characters of a document
MULTIPLE = 64  # of row lengths
OUTLIER = 2  # a length that holds all rows is taken up to so many times what most need


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of ``rows`` in the data, tokens of those that were looked at.

    ``own``: what ``batch.seq_len`` must hold. ``row``: what a row of a batch takes, where answers
    share it; else the same. ``draws``: of documents, below which shares they are held out.
    """

    rows: int
    own: np.ndarray
    row: np.ndarray
    draws: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    @property
    def longest(self) -> int:
        """Of those looked at."""
        return int(self.own.max())

    @property
    def tokens(self) -> int:
        """Of all rows, by the mean."""
        return round(float(self.row.mean()) * self.rows)

    @property
    def looked(self) -> str:
        """Which rows the figures are of."""
        if len(self.own) == self.rows:
            return f"the {self.rows:,} rows"
        return f"{len(self.own):,} of the {self.rows:,} rows"

    def share(self, seq_len: int) -> float:
        """Of rows that ``seq_len`` holds."""
        return float((self.own <= seq_len).mean())

    def at(self, quantile: float) -> int:
        """Tokens that this share of the rows do not exceed."""
        return int(np.quantile(self.own, quantile, method="higher"))


def fitting(lengths: Lengths, most: int) -> int:
    """A row length that holds all rows, or nearly all where a few are far longer; at most ``most``.

    A multiple of `MULTIPLE` where ``most`` lets it.
    """
    common = lengths.at(0.99)
    wanted = lengths.longest if lengths.longest <= OUTLIER * common else common
    return min(most, math.ceil(wanted / MULTIPLE) * MULTIPLE)


class _Spread(DataSource):
    """Every so many rows of a source."""

    _every: int = PrivateAttr(1)

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """See `DataSource.rows`."""
        return itertools.islice(super().rows(), 0, None, self._every)

    def documents(
        self, strict: bool = False, tokenizer: Tokenizer | None = None
    ) -> Iterator[Document]:
        """See `DataSource.documents`."""
        return itertools.islice(super().documents(strict, tokenizer), 0, None, self._every)


def spread(source: DataSource, rows: int) -> DataSource:
    """A source with about `SAMPLE` of its ``rows``, or all of fewer."""
    found = _Spread.model_construct(**dict(source))
    found._every = max(1, rows // SAMPLE)
    return found


def of_conversations(source: DataSource, rows: int, tokenizer: Tokenizer) -> Lengths:
    """Pairs of each conversation, as `data.packing` counts them. Raises DataError with the row."""
    examples = build_chat_examples([spread(source, rows)], tokenizer)
    return _lengths(rows, [len(e.ids) - 1 for e in examples])


def of_rankings(source: DataSource, rows: int, tokenizer: Tokenizer, reading: Reading) -> Lengths:
    """Of each, the prompt with its longest answer, and the prompt with all. DataError as above."""
    found = list(read_rankings([spread(source, rows)], tokenizer, reading))
    return _lengths(rows, [r.longest for r in found], [r.num_tokens for r in found])


def of_documents(source: DataSource, rows: int, tokenizer: Tokenizer) -> Lengths:
    """Tokens of each document and its end; of a long one by those of its beginning."""
    texts = [document.text for document in spread(source, rows).documents()]
    heads = tokenizer.encode_batch([text[:HEAD] for text in texts])
    scales = (max(1.0, len(text) / HEAD) for text in texts)
    own = np.asarray([round(len(i) * s) + 1 for i, s in zip(heads, scales, strict=True)])
    return Lengths(rows, own, own, np.asarray([draw(text.encode()) for text in texts]))


def of_problems(task: FileTaskConfig, tokenizer: Tokenizer) -> Lengths:
    """Tokens of each prompt, as the model is given it."""
    problems = list(task.problems("train_rl"))
    prompts = (
        encode_chat(tokenizer, prompt_messages(p, task), add_generation_prompt=True)[0]
        for p in problems[:: max(1, len(problems) // SAMPLE)]
    )
    return _lengths(len(problems), [len(ids) for ids in prompts])


def _lengths(rows: int, own: Sequence[int], row: Sequence[int] | None = None) -> Lengths:
    return Lengths(rows, np.asarray(own), np.asarray(own if row is None else row))
