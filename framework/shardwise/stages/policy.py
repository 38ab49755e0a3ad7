"""What stages share that learn from their own completions: half of each step."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.data.sampler import Sampler
from shardwise.engines.base import Engine
from shardwise.losses.scores import Score
from shardwise.ops import rng
from shardwise.rewards import ProblemSet, build_reward
from shardwise.stages.base import ACTOR, Stage, StageContext
from shardwise.stages.groups import Group
from shardwise.stages.initial_weights import folder_hash
from shardwise.stages.rollout_worker import RolloutWorker
from shardwise.stages.rollouts import ForwardPass, gather_records, rollout_file
from shardwise.stages.row_holders import Shares, union
from shardwise.stages.unscored import Unscored
from shardwise.storage.durable import StorageError, write_durably

log = logging.getLogger(__name__)

UNSCORED = -1e6  # what a verifier is told of a completion without a score: equal to itself


class PolicyStage(Stage):
    """A policy, its problems in order, and its rollout worker.

    A subclass calls `deal_rows` when its roles are there.
    """

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.config = ctx, ctx.stage
        config = ctx.stage
        self.engine: Engine = ctx.engine(config.optimizer)
        self.problems = ProblemSet(config.task, "train_rl", config.num_problems)
        self.order = Sampler(len(self.problems), ctx.run.seed, config.name)
        self.unscored = Unscored(config.name, config.max_unscorable_steps)
        self.rollout_worker = RolloutWorker(ctx, config.task, build_reward(config.reward))

    def deal_rows(self, *, learn: Sequence[Engine], read: Sequence[Engine]) -> None:
        """Say which engines learn from a rollout, by mini-batches, and which only read it whole; a
        collective call.
        """
        size, parts = self.config.batch.global_batch, self.config.updates_per_rollout
        self.shares = {id(engine): Shares(engine) for engine in (*learn, *read)}
        self.need = union(
            *(self.shares[id(engine)].rows(size, parts) for engine in learn),
            *(self.shares[id(engine)].rows(size) for engine in read),
        )

    def forward_pass(
        self,
        name: str,
        engine: Engine,
        fn: Callable[[Any, MicroBatch], Tensor],
        score: Score | None = None,
    ) -> ForwardPass:
        """See `ForwardPass`."""
        micro = self.config.batch.micro_batch
        return ForwardPass(name, engine, self.shares[id(engine)], fn, micro, score)

    def frozen(self, role: str) -> Engine:
        """A model that stands still: also after a resume it is what it was at the start."""
        return self.ctx.frozen(role, self.engine)

    def initial_weights_hash(self, engines: Mapping[str, Engine | None]) -> str:
        """A hash of the problems and of the weights that the roles in use start from."""
        said = [self.config.task.identity(), self.config.num_problems]
        roles = [ACTOR, *(role for role, engine in engines.items() if engine is not None)]
        said += [folder_hash(self.ctx.initial_checkpoint(role)) for role in roles]
        return xxhash.xxh3_128_hexdigest(json.dumps(said).encode())

    def loss_with_length(self, loss: Any) -> Any:
        """The loss's config, its length constant (Dr. GRPO) filled in: the longest completion."""
        if loss.aggregation != "constant" or loss.length_constant is not None:
            return loss
        return loss.model_copy(update={"length_constant": self.config.sampling.max_new_tokens})

    def longest_row(self) -> int:
        """Tokens that a training row may have: the longest prompt and all its completions."""
        prompt = max(len(self.rollout_worker.prompt_of(p)) for p in self.problems)
        completions = self.config.samples_per_prompt * self.config.sampling.max_new_tokens
        return prompt - 1 + int(completions)

    def roll_out(self, step: int) -> tuple[list[Group], range]:
        """The completions of a step by the weights of now; a collective call."""
        config = self.config
        size = config.batch.global_batch
        ids = range(step * size, (step + 1) * size)
        self.rollout_worker.sync(self.engine)
        groups = self.rollout_worker.rollout(
            [self.problems[int(i)] for i in self.order.batch(step * size, size)],
            config.sampling,
            config.samples_per_prompt,
            key=rng.key(self.ctx.run.seed, "rollout", config.name, step),
            prompt_ids=ids,
            need=self.need,
        )
        for group in (g for g in groups if g.here):
            self.ctx.watch("rollout", f"step {step + 1} prompt {group.prompt_id}", group.numbers())
        return groups, ids

    def mini_batches(self, groups: Sequence[Group]) -> list[slice]:
        """A rollout's groups by update; where no completion has a score, there is no update."""
        each = len(groups) // self.config.updates_per_rollout
        parts = [slice(i, i + each) for i in range(0, len(groups), each)]
        return [p for p in parts if any(r is not None for g in groups[p] for r in g.rewards)]

    def events(self) -> list[tuple[str, str]]:
        """Reasons for which completions have no score."""
        return self.unscored.events()

    def state_dict(self) -> dict[str, Any]:
        """What is known of completions without a score."""
        return {"unscored": self.unscored.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self.unscored.load_state_dict(state.get("unscored", {}))

    def experienced(self, step: int, groups: Sequence[Group]) -> bool:
        """A rollout with all that is learnt from: shown to whoever watches, and stored.

        Whether there is anything to learn from; raises UnscorableError when there was nothing
        for too long.
        """
        self._watch(step, groups)
        every = self.config.keep_rollouts_every
        if every and step % every == 0:
            self._keep(step, gather_records(step, groups, self.need))
        reasons = [reason for group in groups for reason in group.unscored()]
        return self.unscored.step(reasons, step == self.config.steps - 1)

    def _keep(self, step: int, lines: bytes) -> None:
        if self.ctx.is_main:
            try:
                write_durably(rollout_file(self.ctx.directory, self.config.name, step), lines)
            except StorageError as error:  # a full disk must not cost the run
                log.warning("the rollout of step %d is not kept: %s", step, error)
                self.ctx.logger.note("rollout_lost", str(error), self.config.name, step)

    def _watch(self, step: int, groups: Sequence[Group]) -> None:
        """Tell a verifier what is learnt from, by prompt, completion by completion."""
        for group in (g for g in groups if g.here):
            where = f"step {step + 1} prompt {group.prompt_id}"
            for name, found in group.per_token.items():
                numbers = [np.full(1, np.nan) if v is None else np.atleast_1d(v) for v in found]
                flat = np.nan_to_num(np.concatenate(numbers).astype(float), nan=UNSCORED)
                self.ctx.watch(name.removesuffix("_BT"), where, flat)
