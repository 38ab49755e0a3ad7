"""Pre-training: next-token prediction over packed documents."""

from __future__ import annotations

from shardwise.data.datasets import build_pretrain_dataset
from shardwise.stages.base import StageContext
from shardwise.stages.pretrain_config import PretrainConfig
from shardwise.stages.supervised import SupervisedStage


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
