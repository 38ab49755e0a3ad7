"""What a recipe says about a job that filters rows."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.metrics import Metric
from shardwise.config.schema import DataSection, JobConfig, PositiveInt, SmallSizes
from shardwise.curation.config import FilterRules
from shardwise.curation.rows import FILTERED
from shardwise.data.source import DataSource


class FilterDataConfig(DataSection):
    """The rows that are filtered, all of one format."""

    reads: ClassVar[tuple[str, ...]] = FILTERED

    sources: list[DataSource] = Field(
        min_length=1,
        description="rows, of files or of earlier jobs, all of one format",
        examples=[[{"path": "rollouts.jsonl"}], [{"from": "search.sft"}]],
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        for i, source in enumerate(self.sources):
            if source.kind != "auto" and source.format not in FILTERED:
                kinds = ", ".join(FILTERED)
                self.refuse(("sources", i, "kind"), f"is {source.kind}; filtered are {kinds}")
        return self


class FilterConfig(FilterRules, JobConfig):
    """Keeps the rows that are worth training on, and says why the others are not."""

    outputs = {"kept": "auto", "dropped": "auto", "report": "report"}

    kind: Literal["filter"]
    data: FilterDataConfig
    chunk: PositiveInt = Field(
        1024, description="rows that are judged between two saves of what is done"
    )

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `JobConfig.shrunk`: more than one part."""
        found = super().shrunk(small, folder)
        return found.model_copy(update={"chunk": min(self.chunk, 8)})

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `Logs.metrics`."""
        return (
            Metric("rows", "rows read", "rows"),
            Metric("kept", "rows kept", "rows"),
            Metric("rows_left", "left by rules of single rows", "share of rows", line="left"),
            Metric("mean_score", "mean score of the rows read"),
            Metric("mean_score_kept", "mean score of those kept"),
        )
