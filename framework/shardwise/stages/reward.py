"""Reward models: a scalar head; here the outcome kind, which ranks answers as its data does.

Preferences come from files, or from a family of problems: the right answer against answers that
are right for other problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from shardwise.data.preferences import Ranking
from shardwise.data.sampler import Sampler
from shardwise.data.steps import Solution
from shardwise.engines.base import Engine
from shardwise.losses.contract import Loss
from shardwise.losses.ranking import RankingLoss, measures
from shardwise.optim.schedules import consumed_before, global_batch_at
from shardwise.stages.base import Stage, StageContext
from shardwise.stages.data_shards import Rows, local_batches, measure
from shardwise.stages.rankings import RankingRows, samples_hash, stage_rankings
from shardwise.stages.rollouts import values_of

S = TypeVar("S", Ranking, Solution)


class ScalarStage(Stage, Generic[S]):
    """A scalar head that learns from rows with scores at some of their tokens."""

    def __init__(self, ctx: StageContext, train: list[S], held_out: list[S], loss: Loss) -> None:
        self.ctx, self.config = ctx, ctx.stage
        self.train: list[S] = train
        self.held_out: list[S] = held_out
        self.loss = loss
        self.order = Sampler(len(train), ctx.run.seed, self.config.name)
        self.engine: Engine = ctx.engine(self.config.optimizer)
        self.data_hash = samples_hash(train, held_out)

    def rows(self, samples: Sequence[S], first_id: int) -> Rows:
        """Samples as rows, numbered from ``first_id`` on."""
        raise NotImplementedError

    def measures(self, samples: Sequence[S], scores: list[list[np.ndarray]]) -> dict[str, Any]:
        """Figures of held-out samples, from the scores of each row's branches."""
        raise NotImplementedError

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """One update on the samples of ``step``."""
        batch = self.config.batch
        position, size = consumed_before(batch, step), global_batch_at(batch, step)
        chosen = [self.train[int(i)] for i in self.order.batch(position, size)]
        batches = local_batches(self.rows(chosen, position), self.engine, batch.micro_batch)
        metrics = self.engine.forward_backward(batches, self.loss, lr)
        return metrics | {
            "grad_norm": self.engine.step(lr),
            "tokens": float(sum(s.num_tokens for s in chosen)),
            "samples": float(position + size),
        }

    def validate(self) -> dict[str, float]:
        """`measures` of held-out samples, as ``val_*``."""
        if not self.held_out:
            return {}
        batch, limit = self.config.batch, self.config.validation.max_batches
        some = self.held_out[: limit * batch.global_batch or None]
        scores = measure(self.rows(some, 0), self.engine, batch.micro_batch, values_of)
        return {f"val_{name}": value for name, value in self.measures(some, scores).items()}


class RewardStage(ScalarStage[Ranking]):
    """See `RewardModelConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        super().__init__(ctx, *stage_rankings(ctx), RankingLoss(ctx.stage.loss))

    def rows(self, samples: Sequence[Ranking], first_id: int) -> RankingRows:
        """See `ScalarStage.rows`."""
        ids = range(first_id, first_id + len(samples))
        return RankingRows(samples, ids, self.ctx.tokenizer.pad_id)

    def measures(
        self, samples: Sequence[Ranking], scores: list[list[np.ndarray]]
    ) -> dict[str, Any]:
        """Loss, accuracy and calibration."""
        flat = torch.from_numpy(np.concatenate([s for of_row in scores for s in of_row]))
        ratings = torch.tensor([r for s in samples for r in s.ratings], dtype=torch.float64)
        keys = torch.tensor([i for i, s in enumerate(samples) for _ in s.answers])
        found: dict[str, Any] = measures(flat, ratings, keys, self.config.loss)
        return found
