"""Contamination: rows that say what is kept for measuring."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardwise.curation.config import ContaminationConfig
from shardwise.curation.rows import Row, read_source
from shardwise.curation.words import ngrams, normal, words


@dataclass(frozen=True)
class HeldOutText:
    """A held-out problem, conversation or document; ``where`` names it, its set first.

    ``exact``: an equal prompt alone overlaps it, as where problems of one form are made without
    end: those beside it share most of their words, and are other problems.
    """

    where: str
    prompt: str
    answers: Sequence[str] = ()
    exact: bool = False


class HeldOut:
    """Held-out texts, by their prompts and by the runs of words in prompts and answers."""

    def __init__(self, config: ContaminationConfig, texts: Iterable[HeldOutText] = ()) -> None:
        """``texts``: beside those of the config's own sources."""
        self.config = config
        self._seen: set[tuple[str, ...]] = set()
        self._prompts: dict[str, str] = {}
        self._where: list[str] = []
        self._having: dict[int, list[int]] = defaultdict(list)  # run of words: texts that have it
        for text in texts:
            self._add(text)
        for source in config.sources:
            for row in read_source(source):
                self._add(HeldOutText(row.where, row.prompt, row.answers))
        if config.common:
            self._having = {
                run: texts for run, texts in self._having.items() if len(texts) <= config.common
            }
        self._num_runs = Counter(i for texts in self._having.values() for i in texts)

    def _add(self, text: HeldOutText) -> None:
        """Once each: a set that two evaluations measure on must not make its words common."""
        said = (text.prompt, *text.answers)
        if said in self._seen:
            return
        self._seen.add(said)
        if key := normal(text.prompt):
            self._prompts.setdefault(key, text.where)
        if not text.exact and (runs := self._runs(said)):
            self._where.append(text.where)
            for run in runs:
                self._having[run].append(len(self._where) - 1)

    def _runs(self, texts: Iterable[str]) -> frozenset[int]:
        n = self.config.ngram
        return frozenset().union(*(ngrams(words(text), n) for text in texts))

    def overlap(self, row: Row) -> str:
        """What a row shares with a held-out text; empty: nothing."""
        if (where := self._prompts.get(row.prompt_key)) is not None:
            return f"asks what {where} asks"
        if not self._having:
            return ""
        shared = Counter(
            i for run in self._runs(row.texts("row")) for i in self._having.get(run, ())
        )
        for i, number in sorted(shared.items()):
            if number >= max(1, math.ceil(self.config.share * self._num_runs[i] - 1e-9)):
                return f"shares {number} runs of {self.config.ngram} words with {self._where[i]}"
        return ""
