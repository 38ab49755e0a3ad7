"""Config of outcome reward models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shardwise.losses.config import RankingLossConfig
from shardwise.stages.ranking_config import RankingStageConfig


class RewardModelConfig(RankingStageConfig):
    """See `RankingStageConfig`."""

    head: ClassVar[Literal["vocabulary", "scalar"]] = "scalar"

    kind: Literal["reward"]
    loss: RankingLossConfig = Field(default_factory=RankingLossConfig)
