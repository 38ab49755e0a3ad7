"""Distillation: a student learns what a teacher gives every word of a text, token by token.

One step: rows of given texts, or of texts that the student's weights of now write; the teacher's
likeliest words of each of their tokens; one update. Which steps are on-policy follows from the
step's number. The teacher reads its own share of the same rows under its own layout.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import torch
import xxhash
from tokenizers import Tokenizer as Backend

from shardwise.checkpoint.convert import open_model
from shardwise.data.batch import MicroBatch
from shardwise.data.sampler import Sampler
from shardwise.engines.base import Engine
from shardwise.errors import ConfigError
from shardwise.losses.distill import LOGPROBS, WORDS, DistillLoss, TeacherWords
from shardwise.models import travel
from shardwise.ops import rng
from shardwise.optim.schedules import consumed_before, global_batch_at
from shardwise.rewards import ProblemSet, RewardConfig, build_reward
from shardwise.stages.base import TEACHER, Stage, StageContext
from shardwise.stages.data_shards import Rows, forward_shard, hand_over, local_batches
from shardwise.stages.distill_config import DistillConfig
from shardwise.stages.initial_weights import folder_hash
from shardwise.stages.rollout_worker import RolloutWorker
from shardwise.stages.rollouts import RolloutRows, rollout_metrics
from shardwise.stages.row_holders import Shares, union
from shardwise.stages.sft import chat_rows
from shardwise.stages.supervised import ChosenRows


class DistillStage(Stage):
    """See `DistillConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.config = ctx, ctx.stage
        config: DistillConfig = ctx.stage
        check_vocabulary(ctx)
        said = [folder_hash(ctx.initial_checkpoint(TEACHER)), config.on_policy_fraction]
        self.train, self.validation, data_hash = chat_rows(ctx)
        self.order = Sampler(self.train.num_rows, ctx.run.seed, config.name)
        self.engine: Engine = ctx.engine(config.optimizer)
        self.teacher = ctx.frozen(TEACHER, self.engine)
        self.learning, self.teaching = Shares(self.engine), Shares(self.teacher)
        self.words = TeacherWords(config.loss, ctx.model.vocab_size)
        self.loss = DistillLoss(config.loss)
        if config.on_policy_fraction:
            assert config.task is not None
            self.problems = ProblemSet(config.task, "train_rl", config.num_problems)
            self.prompts = Sampler(len(self.problems), ctx.run.seed, f"{config.name}/prompts")
            verifier = build_reward(RewardConfig())  # asked, and not learnt from
            self.rollout_worker = RolloutWorker(ctx, config.task, verifier)
            said.append(config.task.identity())
        self.data_hash = xxhash.xxh3_128_hexdigest(json.dumps([data_hash, *said]).encode())

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """One update on given texts, or on the student's own."""
        batch = self.config.batch
        written = self._written_before(step)
        own = self._written_before(step + 1) > written
        number = written if own else step - written  # of steps like this one
        position, size = consumed_before(batch, number), global_batch_at(batch, number)
        ids = range(position, position + size)
        rows, found = self._write(step, ids) if own else self._given(ids)
        batches = self._taught(rows, "own" if own else "given")
        metrics = self.engine.forward_backward(batches, self.loss, lr)
        return metrics | found | {"grad_norm": self.engine.step(lr), "own_texts": float(own)}

    def validate(self) -> dict[str, float]:
        """The divergence on held-out texts, a token."""
        if self.validation is None:
            return {}
        batch, limit = self.config.batch, self.config.validation.max_batches
        total = min(self.validation.num_rows, limit * batch.global_batch or 1 << 62)
        sums = np.zeros(2)
        for start in range(0, total, batch.global_batch):
            ids = range(start, min(start + batch.global_batch, total))
            rows = ChosenRows(self.validation, ids, ids, self.config.data.pack)
            batches = self._taught(rows, "validation")
            for some, value in zip(
                batches, self.engine.forward(batches, self.loss.per_token), strict=True
            ):
                sums += [float(value.sum(dtype=torch.float64)), float(some.loss_mask_BT.sum())]
        divergence, tokens = self.engine.sum_over_data(sums.tolist())
        return {"val_loss": divergence / tokens, "val_tokens": tokens} if tokens else {}

    # --- one step -------------------------------------------------------------------------------

    def _written_before(self, step: int) -> int:
        """How many of the steps before it are on-policy: as evenly spread as they can be."""
        fraction: float = self.config.on_policy_fraction
        return math.floor(step * fraction)

    def _given(self, ids: range) -> tuple[Rows, dict[str, float]]:
        indices = [int(i) for i in self.order.batch(ids.start, len(ids))]
        tokens = float(sum(self.train.num_pairs(i) for i in indices))
        rows = ChosenRows(self.train, indices, ids, self.config.data.pack)
        return rows, {"tokens": tokens, "samples": float(ids.stop)}

    def _write(self, step: int, ids: range) -> tuple[Rows, dict[str, float]]:
        """What the student writes now, where it or the teacher reads it; a collective call."""
        config: DistillConfig = self.config
        self.rollout_worker.sync(self.engine)
        groups = self.rollout_worker.rollout(
            [self.problems[int(i)] for i in self.prompts.batch(ids.start, len(ids))],
            config.sampling,
            config.samples_per_prompt,
            key=rng.key(self.ctx.run.seed, "rollout", config.name, step),
            prompt_ids=ids,
            need=union(self.learning.rows(len(ids)), self.teaching.rows(len(ids))),
        )
        for group in (g for g in groups if g.here):
            self.ctx.watch("rollout", f"step {step + 1} prompt {group.prompt_id}", group.numbers())
        told = rollout_metrics(groups)
        kept = {name: told[name] for name in ("tokens", "completion_length", "stopped_fraction")}
        return RolloutRows(groups, ids, self.ctx.tokenizer.pad_id), kept

    def _taught(self, rows: Rows, what: str) -> list[MicroBatch]:
        """The student's share of rows, with what the teacher says of their valid tokens."""
        micro, words = self.config.batch.micro_batch, self.words
        share = forward_shard(local_batches(rows, self.teacher, micro), self.teacher, words)
        width = words.num_words + words.num_buckets
        have, need = self.teaching.computed(len(rows)), self.learning.computed(len(rows))
        numbers = hand_over(rows, self.teacher, share, have, need)
        own = np.concatenate([np.zeros(0), *numbers.values()])
        batches = local_batches(rows, self.engine, micro)
        sizes = [int(n) for b in batches for n in b.loss_mask_BT.sum(dim=1)]
        keys = [f"{what} {int(i)}" for b in batches for i in b.sample_ids_B]
        parts = np.split(own.reshape(-1, width), np.cumsum(sizes)[:-1])
        real = [i for i, size in enumerate(sizes) if size]  # the others fill up a share
        # Near a tie, rounding decides which word is among the likeliest.
        given = self.ctx.external(
            "teacher", [keys[i] for i in real], lambda: [parts[i] for i in real], repeatable=True
        )
        found = iter(given)
        return [_with_teacher(b, [next(found) for n in b.loss_mask_BT.sum(dim=1) if n], words)
                for b in batches]  # fmt: skip


def _with_teacher(batch: MicroBatch, of_rows: list[np.ndarray], words: TeacherWords) -> MicroBatch:
    """A micro-batch with the teacher's words and log-probabilities at its valid tokens."""
    width = words.num_words + words.num_buckets
    whole = torch.zeros((*batch.loss_mask_BT.shape, width), dtype=torch.float64)
    if of_rows:
        whole[batch.loss_mask_BT] = torch.from_numpy(np.concatenate(of_rows))
    extras = {WORDS: whole[..., : words.num_words].long(), LOGPROBS: whole[..., words.num_words :]}
    return dataclasses.replace(batch, extras={**batch.extras, **extras})


def check_vocabulary(ctx: StageContext) -> None:
    """Refuse a teacher that speaks other tokens than the student. Raises ConfigError."""
    source = ctx.initial_checkpoint(TEACHER)
    ctx.model_of(TEACHER)  # of another size
    if source is None or (file := open_model(source).files.get(travel.TOKENIZER)) is None:
        return
    theirs, ours = (
        Backend.from_str(f.decode()).get_vocab()
        for f in (file, ctx.tokenizer.files()[travel.TOKENIZER])
    )
    if theirs != ours:
        strange = min(w for w in ours.keys() | theirs.keys() if ours.get(w) != theirs.get(w))
        raise ConfigError(
            f"stages.{ctx.stage.name}.roles.teacher.init_from: {source} has another vocabulary "
            f"({strange!r} is token {theirs.get(strange)} there, {ours.get(strange)} here), and "
            "distributions of other tokens cannot be compared; take a teacher of the student's "
            "tokenizer, or let it write texts and learn them with a stage of kind sft"
        )
