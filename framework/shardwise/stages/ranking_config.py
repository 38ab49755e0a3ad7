"""What configs of stages share that learn from answers that are better, worse, right or wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from shardwise.config.metrics import Metric
from shardwise.config.schema import NonNegativeInt, Rows, SmallSizes, StageConfig
from shardwise.data.config import PreferenceDataConfig, Reading, RowsConfig
from shardwise.rewards import AnyTask, fill_for_file
from shardwise.stages.declarations import COMPARISON_LOSS


class AnswersConfig(StageConfig):
    """What is learnt from are answers with a verdict: of files, of a task's problems, or both."""

    data: RowsConfig
    task: AnyTask | None = Field(
        None, description="also make answers to these problems, right and wrong"
    )
    num_problems: Rows | None = Field(
        4096, description="problems of the task's train_sft split; null: all of a file, its default"
    )
    num_held_out: NonNegativeInt | None = Field(
        256, description="validation: of its held_out split; null: all of a file, its default"
    )
    answers_per_problem: int = Field(4, ge=2, le=1024, description="one right, the others wrong")

    @model_validator(mode="after")
    def _all_of_a_file(self) -> Self:
        fill_for_file(self, "num_problems", "num_held_out")
        return self

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.data.sources and self.task is None:
            raise ValueError("give data.sources, or a task, to learn from")
        return self

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `StageConfig.shrunk`."""
        updates = {
            "num_problems": min(self.num_problems or 64, 64),
            "num_held_out": 24 if self.num_held_out is None else min(self.num_held_out, 24),
            "answers_per_problem": min(self.answers_per_problem, 3),
        }
        return super().shrunk(small, folder).model_copy(update=updates)


class RankingStageConfig(AnswersConfig):
    """``batch`` counts rankings; all answers to a prompt stand in one row, the prompt once."""

    data: PreferenceDataConfig = Field(default_factory=PreferenceDataConfig)

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `StageLogs.metrics`."""
        return (*super().metrics(), *COMPARISON_LOSS)

    def reading(self) -> Reading:
        """How rows of its sources are read."""
        return self.data.reading(self.batch.seq_len)
