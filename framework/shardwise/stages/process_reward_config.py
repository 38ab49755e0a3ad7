"""Config of process reward models."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from shardwise.config.metrics import LOSS, VAL_LOSS, Metric
from shardwise.config.section import shown
from shardwise.data.config import StepDataConfig, StepReading
from shardwise.stages.declarations import STEPS, VALIDATED_STEPS, with_validation
from shardwise.stages.ranking_config import AnswersConfig


class ProcessRewardConfig(AnswersConfig):
    """A process reward model: the chance that each step of an answer is right (Lightman et al.
    2023).

    ``batch`` counts answers. Of a task's problem, the right answer is cut at data.separator; the
    wrong ones go on from some step on as another problem's.
    """

    head: ClassVar[Literal["vocabulary", "scalar"]] = "scalar"
    scores_steps = True

    model_config = shown(
        kind="process_reward",
        steps=100,
        data={"sources": [{"kind": "steps", "path": "steps.jsonl"}]},
    )

    kind: Literal["process_reward"]
    data: StepDataConfig = Field(default_factory=StepDataConfig)

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `StageLogs.metrics`."""
        losses = (replace(m, unit="nats per step") for m in (LOSS, VAL_LOSS))
        return (*super().metrics(), *losses, *with_validation(*STEPS), *VALIDATED_STEPS)

    def reading(self) -> StepReading:
        """How rows of its sources are read."""
        return self.data.reading(self.batch.seq_len)
