"""Pre-training: next-token prediction over packed documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.config.schema import StageConfig
from shardwise.data.config import DataConfig, build_pretrain_dataset
from shardwise.stages.base import StageContext
from shardwise.stages.supervised import SupervisedStage


class PretrainConfig(StageConfig):
    """Documents from ``data.sources``, packed into rows of ``batch.seq_len`` tokens."""

    kind: Literal["pretrain"]
    data: DataConfig = Field(default_factory=DataConfig)


class PretrainStage(SupervisedStage):
    """See `PretrainConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        config: PretrainConfig = ctx.stage
        dataset = build_pretrain_dataset(
            config.data, ctx.tokenizer, config.batch.seq_len, ctx.run.seed, ctx.cache
        )
        super().__init__(
            ctx, dataset, dataset.sampler(config.name), dataset.validation, dataset.hash
        )
