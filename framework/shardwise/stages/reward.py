"""Outcome reward models: a scalar head that ranks answers as its data does.

Preferences come from files, or from a family of problems: the right answer against answers that
are right for other problems.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shardwise.data.preferences import Ranking
from shardwise.data.sampler import Sampler
from shardwise.engines.base import Engine
from shardwise.losses.ranking import RankingLoss, measures
from shardwise.optim.schedules import consumed_before, global_batch_at
from shardwise.stages.base import Stage, StageContext
from shardwise.stages.data_shards import local_batches, measure
from shardwise.stages.rankings import RankingRows, rankings_hash, stage_rankings
from shardwise.stages.reward_config import RewardModelConfig
from shardwise.stages.rollouts import values_of


class RewardStage(Stage):
    """See `RewardModelConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.config = ctx, ctx.stage
        config: RewardModelConfig = ctx.stage
        self.train, self.held_out = stage_rankings(ctx)
        self.order = Sampler(len(self.train), ctx.run.seed, config.name)
        self.engine: Engine = ctx.engine(config.optimizer)
        self.loss = RankingLoss(config.loss)
        self.data_hash = rankings_hash(self.train, self.held_out)

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """One update on the rankings of ``step``."""
        batch = self.config.batch
        position, size = consumed_before(batch, step), global_batch_at(batch, step)
        chosen = [self.train[int(i)] for i in self.order.batch(position, size)]
        rows = self._rows(chosen, position)
        batches = local_batches(rows, self.engine, batch.micro_batch)
        metrics = self.engine.forward_backward(batches, self.loss, lr)
        return metrics | {
            "grad_norm": self.engine.step(lr),
            "tokens": float(sum(r.num_tokens for r in chosen)),
            "samples": float(position + size),
        }

    def validate(self) -> dict[str, float]:
        """Loss, accuracy and calibration on held-out rankings, as ``val_*``."""
        if not self.held_out:
            return {}
        batch, limit = self.config.batch, self.config.validation.max_batches
        micro, some = batch.micro_batch, self.held_out[: limit * batch.global_batch or None]
        scores = measure(self._rows(some, 0), self.engine, micro, values_of)
        flat = torch.from_numpy(np.concatenate([s for of_row in scores for s in of_row]))
        ratings = torch.tensor([r for s in some for r in s.ratings], dtype=torch.float64)
        keys = torch.tensor([i for i, s in enumerate(some) for _ in s.answers])
        found = measures(flat, ratings, keys, self.config.loss)
        return {f"val_{name}": value for name, value in found.items()}

    def _rows(self, rankings: Sequence[Ranking], first_id: int) -> RankingRows:
        ids = range(first_id, first_id + len(rankings))
        return RankingRows(rankings, ids, self.ctx.tokenizer.pad_id)
