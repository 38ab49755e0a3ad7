"""Outcome reward models: a scalar head that ranks answers as its data does.

Preferences come from files, or from a family of problems: the right answer against answers that
are right for other problems.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence

import numpy as np
import torch
import xxhash

from shardwise.data.batch import MicroBatch
from shardwise.data.preferences import (
    Ranking,
    collate_rankings,
    encode_ranking,
    read_rankings,
)
from shardwise.data.sampler import Sampler
from shardwise.data.tokenizer import Tokenizer
from shardwise.engines.base import Engine
from shardwise.errors import DataError
from shardwise.losses.ranking import RankingLoss, measures
from shardwise.ops import rng
from shardwise.optim.schedules import consumed_before, global_batch_at
from shardwise.rewards import Problem, ProblemSet, TaskConfig, prompt_messages
from shardwise.rewards.tasks import Split, solution_text
from shardwise.stages.base import Stage, StageContext
from shardwise.stages.data_shards import local_batches, measure
from shardwise.stages.reward_config import RewardModelConfig
from shardwise.stages.rollouts import values_of


@dataclasses.dataclass(frozen=True)
class RankingRows:
    """Rankings as `stages.data_shards` takes them."""

    rankings: Sequence[Ranking]
    row_ids: Sequence[int]
    pad_id: int

    def sizes(self) -> list[list[int]]:
        """One score an answer."""
        return [[1] * len(r.answers) for r in self.rankings]

    def collate(self, rows: Sequence[int], num_real: int) -> MicroBatch:
        """See `data_shards.Rows`."""
        some = [self.rankings[i] for i in rows]
        ids = [self.row_ids[i] for i in rows]
        return collate_rankings(some, ids, self.pad_id, num_real=num_real)


class RewardStage(Stage):
    """See `RewardModelConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.config = ctx, ctx.stage
        config: RewardModelConfig = ctx.stage
        read = functools.partial(
            read_rankings,
            tokenizer=ctx.tokenizer,
            strict=config.data.strict_fields,
            max_tokens=config.batch.seq_len,
        )
        self.train, self.held_out = (
            list(read(config.data.sources)),
            list(read(config.data.validation)),
        )
        if config.task is not None:
            made = (ctx.tokenizer, config.task, config.answers_per_problem, ctx.run.seed)
            self.train += made_rankings(*made, "train_sft", config.num_problems)
            self.held_out += made_rankings(*made, "held_out", config.num_held_out)
        for ranking in (*self.train, *self.held_out):
            if ranking.longest > config.batch.seq_len:
                raise DataError(
                    f"stage {config.name}: a prompt with its longest answer has {ranking.longest} "
                    f"tokens, batch.seq_len is {config.batch.seq_len}; raise it, or drop the line"
                )
        self.order = Sampler(len(self.train), ctx.run.seed, config.name)
        self.engine: Engine = ctx.engine(config.optimizer)
        self.loss = RankingLoss(config.loss)
        said = json.dumps([dataclasses.astuple(r) for r in (*self.train, *self.held_out)])
        self.data_hash = xxhash.xxh3_128_hexdigest(said.encode())

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


def made_rankings(
    tokenizer: Tokenizer, task: TaskConfig, number: int, seed: int, split: Split, num: int
) -> list[Ranking]:
    """The right answer first, then distinct answers of other problems that are wrong here."""
    problems = ProblemSet(task, split, num) if num else []
    pool = [p.answer for p in problems]
    rankings = []
    for problem in problems:
        answers = [problem.answer, *_wrong_answers(problem, pool, number - 1, seed)]
        texts = [solution_text(problem._replace(answer=a), task) for a in answers]
        ratings = [1.0] + [0.0] * (len(texts) - 1)
        rankings.append(encode_ranking(tokenizer, prompt_messages(problem, task), texts, ratings))
    return rankings


def _wrong_answers(problem: Problem, pool: Sequence[str], number: int, seed: int) -> list[str]:
    """Distinct answers of other problems, drawn as often as they occur; fewer if there are not."""
    found: list[str] = []
    for draw in range(50 * number):
        answer = pool[rng.key(seed, "wrong answer", problem.question, draw) % len(pool)]
        if answer != problem.answer and answer not in found:
            found.append(answer)
        if len(found) == number:
            break
    if not found:
        raise DataError(f"problem {problem.question!r}: no other problem has another answer")
    return found
