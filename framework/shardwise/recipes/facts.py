"""What the choices of a recipe follow from, and the numbers that follow at once."""

from __future__ import annotations

import dataclasses
import functools
import math

from shardwise.data.packing import best_fit
from shardwise.recipes import rates
from shardwise.recipes.data import Data
from shardwise.recipes.lengths import MULTIPLE, Lengths, fitting
from shardwise.recipes.machine import Machine
from shardwise.recipes.model import Start

ROW = 2048  # tokens of a row of documents, as Touvron et al. 2023 (Llama) trained on
FEWEST_ROWS = 16  # of documents, however few they are
# Shares of the data that may be held out: the smallest that gives rows enough to measure on.
HELD_OUT, MEASURED = (0.05, 0.1, 0.2), 8
# A share of right answers is 0.05 off, at most, with as many problems as this (one deviation).
MEASURED_PROBLEMS = 100
PACKED = ("pretrain", "sft")  # stages whose rows hold several examples


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the user said."""

    stage: str
    adapter: str | None = None
    held_out: str | None = None
    seq_len: int | None = None
    epochs: float | None = None
    reward: str | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """``validation``: data of their own to measure on, and ``apart`` their lengths; else a share of
    ``data`` is.
    """

    asked: Asked
    start: Start
    data: Data
    lengths: Lengths
    machine: Machine
    validation: Data | None = None
    apart: Lengths | None = None

    @functools.cached_property
    def seq_len(self) -> int:
        """Tokens of a row."""
        if self.asked.seq_len is not None:
            return self.asked.seq_len
        most = self.start.config.max_seq_len
        if self.asked.stage == "grpo":
            whole = self.lengths.longest + self.new_tokens
            return min(most, math.ceil(whole / MULTIPLE) * MULTIPLE)
        if self.asked.stage != "pretrain":
            return fitting(self.lengths, most)
        wanted = min(ROW, most, 1 << math.ceil(math.log2(max(2, self.lengths.longest))))
        while wanted > 32 and self.lengths.tokens < FEWEST_ROWS * wanted:
            wanted //= 2
        return wanted

    @property
    def row(self) -> int:
        """Tokens of the longest row of a batch."""
        if self.asked.stage in PACKED:
            return self.seq_len
        if self.asked.stage == "grpo":
            return self.lengths.longest + rates.SAMPLES * self.new_tokens
        kept = self.lengths.row[self.lengths.own <= self.seq_len]
        return int(kept.max()) if kept.size else self.seq_len

    @property
    def new_tokens(self) -> int:
        """Tokens of a completion, at most."""
        room = self.start.config.max_seq_len - self.lengths.longest
        return max(1, min(rates.NEW_TOKENS[self.machine.device], room))

    @property
    def rows(self) -> int:
        """Rows of an epoch, without those that are held out."""
        return max(1, round((1 - self.held_out) * self._all_rows))

    @functools.cached_property
    def _all_rows(self) -> float:
        if self.asked.stage == "pretrain":
            return self.lengths.tokens / self.seq_len
        kept = self.lengths.own[self.lengths.own <= self.seq_len]
        number = len(best_fit(kept.tolist(), self.seq_len)) if self.packs else len(kept)
        return number * self.lengths.rows / len(self.lengths.own)

    @property
    def packs(self) -> bool:
        """Whether a row holds several examples."""
        return self.asked.stage in PACKED

    @property
    def in_a_row(self) -> float:
        """Examples that a row holds; of documents, tokens."""
        if self.asked.stage == "pretrain":
            return self.seq_len
        return max(1.0, self.lengths.share(self.seq_len) * self.lengths.rows / self._all_rows)

    @functools.cached_property
    def held_out(self) -> float:
        """Share of the data that is kept for validation; 0: there are too few, or others."""
        if self.validation:
            return 0.0
        rows, problems = self.lengths.rows, self.asked.stage == "grpo"
        least = MEASURED_PROBLEMS if problems else MEASURED
        shares = [s for s in HELD_OUT if s * rows >= least] or [HELD_OUT[-1]][:problems]
        return next(filter(self._parted, shares), 0.0)

    def _parted(self, share: float) -> bool:
        """Whether some documents are held out, and some are not; of rows it is next to certain."""
        if self.asked.stage == "grpo":
            return self.data.can_be_parted(share)
        out = self.lengths.draws < share
        return not out.size or bool(out.any() and not out.all())

    @property
    def measures(self) -> bool:
        """Whether there is anything to validate on."""
        return self.validation is not None or self.held_out > 0

    @property
    def whole(self) -> bool:
        """Whether every row was looked at."""
        return len(self.lengths.own) == self.lengths.rows

    @property
    def drops(self) -> bool:
        """Whether some rows do, or may, not fit."""
        every = [self.lengths] if self.apart is None else [self.lengths, self.apart]
        return any(len(x.own) < x.rows or x.longest > self.seq_len for x in every)
