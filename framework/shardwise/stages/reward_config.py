"""Config of outcome reward models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shardwise.config.metrics import Metric
from shardwise.config.section import shown
from shardwise.losses.config import RankingLossConfig
from shardwise.stages.declarations import RANKINGS, with_validation
from shardwise.stages.ranking_config import RankingStageConfig


class RewardModelConfig(RankingStageConfig):
    """An outcome reward model: one score an answer, learnt from rankings.

    See `RankingStageConfig`.
    """

    head: ClassVar[Literal["vocabulary", "scalar"]] = "scalar"

    model_config = shown(
        kind="reward",
        steps=100,
        data={"sources": [{"kind": "preference-jsonl", "path": "pairs.jsonl"}]},
    )

    kind: Literal["reward"]
    loss: RankingLossConfig = Field(default_factory=RankingLossConfig)

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `StageLogs.metrics`."""
        calibration = Metric(
            "val_calibration_error", "calibration error", "probability", better="lower"
        )
        return (*super().metrics(), *with_validation(*RANKINGS), calibration)
