"""Config of outcome reward models."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.schema import NonNegativeInt, Rows, SmallSizes, StageConfig
from shardwise.data.config import PreferenceDataConfig
from shardwise.losses.config import RankingLossConfig
from shardwise.rewards import TaskConfig


class RewardModelConfig(StageConfig):
    """``batch`` counts rankings; all answers to a prompt stand in one row, the prompt once."""

    head: ClassVar[Literal["vocabulary", "scalar"]] = "scalar"

    kind: Literal["reward"]
    data: PreferenceDataConfig = Field(default_factory=PreferenceDataConfig)
    task: TaskConfig | None = Field(None, description="also make preferences of these problems")
    num_problems: Rows = Field(4096, description="problems of the task's train_sft split")
    num_held_out: NonNegativeInt = Field(256, description="validation: of its held_out split")
    answers_per_problem: int = Field(4, ge=2, le=1024, description="one right, the others wrong")
    loss: RankingLossConfig = Field(default_factory=RankingLossConfig)

    @model_validator(mode="after")
    def _has_data(self) -> RewardModelConfig:
        if not self.data.sources and self.task is None:
            raise ValueError("give data.sources, or a task, to learn preferences from")
        return self

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `StageConfig.shrunk`."""
        updates = {
            "num_problems": min(self.num_problems, 64),
            "num_held_out": min(self.num_held_out, 24),
            "answers_per_problem": min(self.answers_per_problem, 3),
        }
        return super().shrunk(small, folder).model_copy(update=updates)
