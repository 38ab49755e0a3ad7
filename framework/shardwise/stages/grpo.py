"""GRPO: completions of fresh problems, rewards from a verifier, group-relative advantages.

One step: sample a group of completions for each prompt from the current weights, score them, turn
rewards into advantages within groups, and update once or several times. Prompts, sampling noise
and the order of updates are pure functions of (seed, step), so a run resumes exactly.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from pydantic import Field, model_validator
from torch import Tensor

from shardwise.config.schema import NonNegativeInt, PositiveInt, StageConfig
from shardwise.data.batch import MicroBatch
from shardwise.data.groups import collate_groups
from shardwise.data.sampler import Sampler
from shardwise.engines.base import Engine
from shardwise.losses.advantages import group_advantages
from shardwise.losses.grpo import GRPOLoss, PolicyLossConfig
from shardwise.losses.logprobs import valid_logprobs
from shardwise.metrics.jsonl import write_jsonl
from shardwise.ops import dice
from shardwise.ops.logits import Logits
from shardwise.rewards import ProblemSet, RewardConfig, TaskConfig, build_reward
from shardwise.rollout.sampling import Sampling
from shardwise.stages.base import StageContext, rank_share
from shardwise.stages.play import Group, Player


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


class GrpoStage:
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
        self.scorer = build_reward(config.reward)
        self.player = Player(ctx, config.task, self.scorer)
        # The reference is the policy at the start of this stage, also after a resume.
        self.reference: Engine | None = None
        if config.loss.kl != "none":
            self.reference = ctx.engine(None)
            ctx.load_start(self.reference)
        said = json.dumps([config.task.model_dump(mode="json"), config.num_problems])
        self.data_hash = xxhash.xxh3_128_hexdigest(said.encode())

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """Roll out, score, update ``updates_per_rollout * epochs_per_rollout`` times."""
        size = self.config.batch.global_batch
        indices = self.order.batch(step * size, size)
        chunks = self._chunks(size)
        mine = np.concatenate([rows for rows, _ in chunks])
        self.player.sync(self.engine)
        groups = self.player.play(
            [self.problems[int(i)] for i in indices[mine]],
            self.config.sampling,
            self.config.samples_per_prompt,
            key=dice.key(self.ctx.run.seed, "rollout", self.config.name, step),
            prompt_ids=step * size + mine,
        )
        metrics = self._add_advantages(groups, mine, size)
        batches = self._batches(groups, mine + step * size, chunks)
        self._add_logprobs([b for chunk in batches for b in chunk])
        updates = []
        for _ in range(self.config.epochs_per_rollout):
            for chunk in batches:
                update = self.engine.forward_backward(chunk, self.loss)
                updates.append(update | {"grad_norm": self.engine.step(lr)})
        self._keep(step, groups)
        return metrics | {n: sum(u[n] for u in updates) / len(updates) for n in updates[0]}

    def validate(self) -> dict[str, float]:
        """Held-out accuracy is an evaluation, see `stages.accuracy`."""
        return {}

    # --- one step -------------------------------------------------------------------------------

    def _chunks(self, size: int) -> list[tuple[np.ndarray, int]]:
        """For each mini-batch: this rank's prompts (indices into the step's), and how many count.

        A mini-batch holds the same prompts whatever the number of ranks.
        """
        each = size // self.config.updates_per_rollout
        share = [rank_share(each, self.engine) for _ in range(self.config.updates_per_rollout)]
        return [(rows + u * each, real) for u, (rows, real) in enumerate(share)]

    def _add_advantages(self, groups: list[Group], mine: np.ndarray, size: int) -> dict[str, float]:
        """Advantages within the global batch, and the rollout's metrics.

        Every rank learns all rewards, so that statistics over the global batch are what one
        process would compute. Prompts that pad a rank's share are written by one rank only.
        """
        samples = self.config.samples_per_prompt
        table = np.zeros((2, size, samples))  # reward, 1 if scorable
        lengths = np.zeros(3)  # completions' tokens, ended by a stop, all trained tokens
        seen: set[int] = set()
        start = self.engine.data_rank
        for index, group in zip(mine.tolist(), groups, strict=True):
            if index in seen or not self._owns(index, size, start):
                continue
            seen.add(index)
            for i, reward in enumerate(group.rewards):
                table[:, index, i] = (0.0, 0.0) if reward is None else (reward, 1.0)
            lengths += group.lengths()
        total = self.engine.sum_over_data([*table.ravel().tolist(), *lengths.tolist()])
        rewards, scorable = np.array(total[:-3]).reshape(table.shape)
        number, stopped, tokens = total[-3:]
        known = np.where(scorable > 0, rewards, np.nan)
        result = group_advantages(
            self.config.loss.advantage, torch.from_numpy(known), self.config.loss.advantage_eps
        )
        for index, group in zip(mine.tolist(), groups, strict=True):
            group.advantages = result.advantages_GN[index].tolist()
        count = size * samples
        return {
            "reward_mean": float(np.nanmean(known)) if scorable.any() else 0.0,
            "reward_std": float(np.nanstd(known)) if scorable.any() else 0.0,
            "degenerate_fraction": result.num_degenerate / size,
            "unscorable_fraction": result.num_unscorable / count,
            "completion_length": number / count,
            "stopped_fraction": stopped / count,
            "tokens": tokens,
        }

    def _owns(self, index: int, size: int, rank: int) -> bool:
        """Whether ``rank`` is the first that holds this prompt of the step."""
        each = size // self.config.updates_per_rollout
        share = -(-each // self.engine.data_size)
        return bool((index % each) // share == rank)

    def _batches(
        self, groups: list[Group], ids: np.ndarray, chunks: list[tuple[np.ndarray, int]]
    ) -> list[list[MicroBatch]]:
        """The micro-batches of each mini-batch."""
        micro = self.config.batch.micro_batch
        batches: list[list[MicroBatch]] = []
        start = 0
        for rows, real in chunks:
            part = range(start, start + len(rows))
            cuts = [list(part[i : i + micro]) for i in range(0, len(rows), micro)]
            batches.append([self._collate(groups, ids, cut, start + real) for cut in cuts])
            start += len(rows)
        return batches

    def _collate(
        self, groups: list[Group], ids: np.ndarray, rows: list[int], end: int
    ) -> MicroBatch:
        some = [groups[i] for i in rows]
        return collate_groups(
            [g.prompt for g in some],
            [g.tokens for g in some],
            ids[rows],
            self.ctx.tokenizer.pad_id,
            pad_multiple=16,
            per_token={
                "advantages_BT": [g.advantages for g in some],
                "rollout_logprobs_BT": [g.logprobs for g in some],
            },
            # Unscorable completions teach nothing; rows from ``end`` on pad this rank's share.
            keep=[[i < end and r is not None for r in groups[i].rewards] for i in rows],
        )

    def _add_logprobs(self, batches: list[MicroBatch]) -> None:
        """Log-probabilities before the first update, and the reference's, where they are needed."""
        temperature = self.config.sampling.temperature

        def logprobs(logits_BTV: Tensor | Logits, batch: MicroBatch) -> Tensor:
            return valid_logprobs(logits_BTV, batch, temperature)

        if self.config.needs_old_logprobs:
            for batch, value in zip(batches, self.engine.forward(batches, logprobs), strict=True):
                batch.extras["old_logprobs_BT"] = value.cpu()
        if self.reference is not None:
            values = self.reference.forward(batches, logprobs)
            for batch, value in zip(batches, values, strict=True):
                batch.extras["ref_logprobs_BT"] = value.cpu()

    def _keep(self, step: int, groups: list[Group]) -> None:
        """Store this rank's rollout as JSON lines: tokens, log-probabilities, advantage, policy."""
        every = self.config.keep_rollouts_every
        if not every or step % every or not self.ctx.mesh.leads:
            return
        folder = self.ctx.directory / "rollouts" / self.config.name
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = [r for g in groups for r in g.records(step)]
        write_jsonl(folder / f"step_{step:08d}.rank_{self.engine.data_rank}.jsonl", rows)
