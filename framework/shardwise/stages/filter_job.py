"""The job ``filter``: rows in, those worth training on out (see `shardwise.curation`).

Rows are judged by themselves in parts, and as a set in the end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import xxhash

from shardwise.config.artifacts import artifacts_of
from shardwise.curation import HeldOut, Row, read_source
from shardwise.curation.config import DuplicatesRule
from shardwise.curation.filtering import Verdict, judge_rows, judge_set, table
from shardwise.curation.row_rules import RowRules
from shardwise.curation.rows import FILTERED
from shardwise.data import files
from shardwise.data.source import DataSource
from shardwise.errors import DataError
from shardwise.stages.base import StageContext
from shardwise.stages.filter_config import FilterConfig
from shardwise.stages.held_out import held_out_texts
from shardwise.stages.jobs import Job, Outcome


class FilterJob(Job):
    """Items are rows; the value of one is [rule, why, its fields where a rule changed them]."""

    cheap = True

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.config = ctx, ctx.stage
        assert isinstance(self.config, FilterConfig)
        self.chunk = self.config.chunk
        self.rows = [row for source in self.config.data.sources for row in read_source(source)]
        self.num_items = len(self.rows)
        if len(formats := sorted({row.format for row in self.rows})) > 1:
            raise DataError(
                f"stages.{self.config.name}.data.sources: rows of {' and of '.join(formats)}; what "
                "is kept is one file of one format: write a job for each"
            )
        texts = list(held_out_texts(ctx.run)) if self.config.contamination.recipe else []
        self.held_out = HeldOut(self.config.contamination, texts)
        said: list[Any] = [dataclasses.astuple(text) for text in texts]
        said += [files.fingerprint(s.told(FILTERED).files()) for s in self._given()]
        self.data_hash = xxhash.xxh3_128_hexdigest(json.dumps(said).encode())

    def _given(self) -> list[DataSource]:
        """All sources but what earlier jobs have written."""
        against = [s for r in self.config.rules if isinstance(r, DuplicatesRule) for s in r.against]
        every = [*self.config.data.sources, *self.config.contamination.sources, *against]
        return [source for source in every if not any(artifacts_of(source))]

    def work(self, items: Sequence[int]) -> list[Any]:
        """See `Job.work`."""
        with RowRules(self.config, self._num_tokens) as rules:
            found = judge_rows([self.rows[i] for i in items], rules, self.held_out)
        return [
            [v.rule, v.why, None if v.row is self.rows[i] else dict(v.row.data)]
            for i, v in zip(items, found, strict=True)
        ]

    def _num_tokens(self, text: str) -> int:
        return len(self.ctx.tokenizer.encode(text))

    def figures(self, records: Sequence[Any]) -> dict[str, float]:
        """See `Job.figures`."""
        return {"rows_left": sum(not rule for rule, *_ in records) / len(records)}

    def finish(self, records: Sequence[Any]) -> Outcome:
        """See `Job.finish`; DataError where no row is left, or one overlaps a held-out set."""
        verdicts = [
            Verdict(self._row(row, changed), rule, why)
            for row, (rule, why, changed) in zip(self.rows, records, strict=True)
        ]
        try:
            filtered = judge_set(verdicts, self.config, self.ctx.run.seed)
        except DataError as error:
            raise DataError(f"stages.{self.config.name}: {error}") from error
        report = filtered.report
        dropped = [
            {**v.row.data, "dropped_by": v.rule, "why": v.why} for v in filtered.verdicts if v.rule
        ]
        figures = ("rows", "kept", "mean_score", "mean_score_kept")
        return Outcome(
            {"kept": [row.data for row in filtered.kept], "dropped": dropped, "report": [report]},
            {name: report[name] for name in figures if report[name] is not None}
            | {f"dropped_by_{rule['rule']}": rule["dropped"] for rule in report["rules"]},
            table(report),
        )

    @staticmethod
    def _row(row: Row, changed: dict[str, Any] | None) -> Row:
        return row if changed is None else dataclasses.replace(row, data=changed)
