"""GRPO: completions of fresh problems, rewards from a verifier, group-relative advantages.

One step: sample a group of completions for each prompt from the current weights, score them, turn
rewards into advantages within groups, and update once or several times. Prompts, sampling noise
and the order of updates are pure functions of (seed, step), so a run resumes exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import torch
import xxhash
from pydantic import Field, model_validator

from shardwise.config.schema import NonNegativeInt, PositiveInt, RoleConfig, Section, StageConfig
from shardwise.data.sampler import Sampler
from shardwise.engines.base import Engine
from shardwise.losses.advantages import group_advantages
from shardwise.losses.grpo import GRPOLoss, PolicyLossConfig
from shardwise.ops import dice
from shardwise.rewards import ProblemSet, RewardConfig, TaskConfig, build_reward
from shardwise.rollout.sampling import Sampling
from shardwise.stages.base import Stage, StageContext, mean_metrics
from shardwise.stages.play import Group, Player
from shardwise.stages.rollouts import (
    Logprobs,
    Reading,
    TrainingRows,
    keep_rollout,
    read_tracks,
    rewards_table,
    rollout_metrics,
)
from shardwise.stages.share import own_batches


class GrpoRoles(Section):
    """Models of the stage that are laid out, placed or started otherwise than the stage says."""

    actor: RoleConfig | None = None
    reference: RoleConfig | None = None


class GrpoConfig(StageConfig):
    """``batch.global_batch`` prompts a step, ``samples_per_prompt`` completions each.

    ``batch.micro_batch`` counts prompts, each with all its completions.
    """

    kind: Literal["grpo"]
    task: TaskConfig = Field(default_factory=TaskConfig)
    num_problems: PositiveInt = Field(4096, description="problems of the task's train_rl split")
    samples_per_prompt: int = Field(8, ge=2, description="size of a group")
    sampling: Sampling = Field(default_factory=Sampling)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    loss: PolicyLossConfig = Field(default_factory=PolicyLossConfig)
    roles: GrpoRoles = Field(default_factory=GrpoRoles)
    updates_per_rollout: PositiveInt = Field(1, description="mini-batches, by prompts")
    epochs_per_rollout: PositiveInt = 1
    keep_rollouts_every: NonNegativeInt = Field(0, description="steps between stored rollouts")

    @model_validator(mode="after")
    def _divides(self) -> GrpoConfig:
        if self.batch.global_batch % self.updates_per_rollout:
            raise ValueError(
                f"updates_per_rollout {self.updates_per_rollout} must divide "
                f"batch.global_batch {self.batch.global_batch}"
            )
        if self.sampling.greedy:
            raise ValueError("sampling.greedy gives every group one answer; nothing can be learnt")
        return self

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the weights move between the rollout and some update of its step."""
        updates = self.updates_per_rollout * self.epochs_per_rollout
        return updates > 1 or self.loss.importance_cap is not None


class GrpoStage(Stage):
    """See `GrpoConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.config = ctx, ctx.stage
        config: GrpoConfig = ctx.stage
        self.engine: Engine = ctx.engine(config.optimizer)
        self.problems = ProblemSet(config.task, "train_rl", config.num_problems)
        self.order = Sampler(len(self.problems), ctx.run.seed, config.name)
        loss = config.loss
        if loss.aggregation == "constant" and loss.length_constant is None:
            length = config.sampling.max_new_tokens
            loss = loss.model_copy(update={"length_constant": length})
        self.loss = GRPOLoss(loss, config.sampling.temperature)
        self.player = Player(ctx, config.task, build_reward(config.reward))
        # The reference is the policy at the start of this stage, also after a resume.
        self.reference: Engine | None = None
        if config.loss.kl != "none":
            self.reference = ctx.engine(None, "reference")
            ctx.load_start(self.reference, "reference")
        said = json.dumps([config.task.model_dump(mode="json"), config.num_problems])
        self.data_hash = xxhash.xxh3_128_hexdigest(said.encode())

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """Roll out, score, update ``updates_per_rollout * epochs_per_rollout`` times."""
        config: GrpoConfig = self.config
        size = config.batch.global_batch
        indices = self.order.batch(step * size, size)
        ids = range(step * size, (step + 1) * size)
        self.player.sync(self.engine)
        groups = self.player.play(
            [self.problems[int(i)] for i in indices],
            config.sampling,
            config.samples_per_prompt,
            key=dice.key(self.ctx.run.seed, "rollout", config.name, step),
            prompt_ids=ids,
        )
        metrics = self._add_advantages(groups)
        self._add_logprobs(groups, ids)
        self.observe(groups)
        each = size // config.updates_per_rollout
        chunks = [
            own_batches(
                self._rows(groups[i : i + each], ids[i : i + each]), self.engine, self.micro
            )
            for i in range(0, size, each)
        ]
        updates = []
        for _ in range(config.epochs_per_rollout):
            for batches in chunks:
                update = self.engine.forward_backward(batches, self.loss)
                updates.append(update | {"grad_norm": self.engine.step(lr)})
        every = config.keep_rollouts_every
        if every and step % every == 0 and self.ctx.is_main:
            keep_rollout(self.ctx.directory / "rollouts" / config.name, step, groups)
        found: dict[str, float] = self.engine.everywhere(mean_metrics(updates))
        return metrics | found

    def observe(self, groups: list[Group]) -> None:
        """Called when a rollout is complete, before the first update; for whoever watches."""

    # --- one step -------------------------------------------------------------------------------

    @property
    def micro(self) -> int:
        """Prompts that a rank computes at once."""
        return int(self.config.batch.micro_batch)

    def _add_advantages(self, groups: list[Group]) -> dict[str, float]:
        """Advantages within the global batch, and the rollout's metrics."""
        loss: PolicyLossConfig = self.config.loss
        known = torch.from_numpy(rewards_table(groups))
        result = group_advantages(loss.advantage, known, loss.advantage_eps)
        for group, advantages_N in zip(groups, result.advantages_GN, strict=True):
            group.tracks["advantages_BT"] = advantages_N.tolist()
            group.tracks["rollout_logprobs_BT"] = list(group.logprobs)
        degenerate = result.num_degenerate / len(groups)
        return rollout_metrics(groups) | {"degenerate_fraction": degenerate}

    def _add_logprobs(self, groups: list[Group], ids: Sequence[int]) -> None:
        """Log-probabilities before the first update, and the reference's, where they are needed."""
        fn = Logprobs(self.config.sampling.temperature)
        readings = []
        if self.config.needs_old_logprobs:
            readings.append(Reading("old_logprobs_BT", self.engine, fn, self.micro))
        if self.reference is not None:
            readings.append(Reading("ref_logprobs_BT", self.reference, fn, self.micro))
        read_tracks(readings, groups, ids, self.ctx.tokenizer.pad_id)

    def _rows(self, groups: Sequence[Group], ids: Sequence[int]) -> TrainingRows:
        tracks = tuple(groups[0].tracks)
        return TrainingRows(groups, ids, self.ctx.tokenizer.pad_id, self.ctx.wide, tracks)
