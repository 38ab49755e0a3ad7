"""GRPO: completions of fresh problems, rewards from a verifier, group-relative advantages.

One step: sample a group of completions for each prompt from the current weights, score them, turn
rewards into advantages within groups, and update once or several times. Prompts, sampling noise
and the order of updates are pure functions of (seed, step), so a run resumes exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.losses.advantages import group_advantages, rewards_tensor
from shardwise.losses.config import PolicyLossConfig
from shardwise.losses.grpo import GRPOLoss
from shardwise.stages.base import StageContext, mean_metrics
from shardwise.stages.data_shards import local_batches
from shardwise.stages.groups import Group
from shardwise.stages.grpo_config import GrpoConfig
from shardwise.stages.policy import PolicyStage
from shardwise.stages.rollouts import (
    Logprobs,
    TrainingRows,
    fractions,
    rollout_metrics,
    run_forward_passes,
)


class GrpoStage(PolicyStage):
    """See `GrpoConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        super().__init__(ctx)
        config: GrpoConfig = ctx.stage
        self.loss = GRPOLoss(self.loss_with_length(config.loss), config.sampling.temperature)
        self.reference = self.frozen("reference") if config.loss.kl != "none" else None
        read = [self.engine] if config.needs_old_logprobs else []
        read += [self.reference] if self.reference is not None else []
        self.deal_rows(learn=[self.engine], read=read)
        self.data_hash = self.initial_weights_hash({"reference": self.reference})

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """Roll out, score, update ``updates_per_rollout * epochs_per_rollout`` times."""
        config: GrpoConfig = self.config
        groups, ids = self.roll_out(step)
        metrics = self._add_advantages(groups)
        self._add_logprobs(groups, ids)
        if not self.experienced(step, groups):
            return metrics
        chunks = [
            local_batches(self._rows(groups[part], ids[part]), self.engine, self.micro)
            for part in self.mini_batches(groups)
        ]
        updates = []
        for _ in range(config.epochs_per_rollout):
            for batches in chunks:
                update = self.engine.forward_backward(batches, self.loss, lr)
                updates.append(update | {"grad_norm": self.engine.step(lr)})
        found: dict[str, float] = self.engine.broadcast(mean_metrics(updates))
        return metrics | found

    # --- one step -------------------------------------------------------------------------------

    @property
    def micro(self) -> int:
        """Prompts that a rank computes at once."""
        return int(self.config.batch.micro_batch)

    def _add_advantages(self, groups: list[Group]) -> dict[str, float]:
        """Advantages within the global batch, and the rollout's metrics."""
        loss: PolicyLossConfig = self.config.loss
        known = rewards_tensor([g.rewards for g in groups])
        result = group_advantages(loss.advantage, known, loss.advantage_eps)
        for group, advantages_N in zip(groups, result.advantages_GN, strict=True):
            group.per_token["advantages_BT"] = advantages_N.tolist()
            if group.here:
                group.per_token["rollout_logprobs_BT"] = list(group.logprobs)
        return rollout_metrics(groups) | fractions(
            {"degenerate_fraction": (result.num_degenerate, int(result.scorable_GN.any(1).sum()))}
        )

    def _add_logprobs(self, groups: list[Group], ids: Sequence[int]) -> None:
        """Log-probabilities before the first update, and the reference's, where they are needed."""
        fn = Logprobs(self.config.sampling.temperature)
        forward_passes = []
        if self.config.needs_old_logprobs:
            forward_passes.append(self.forward_pass("old_logprobs_BT", self.engine, fn))
        if self.reference is not None:
            forward_passes.append(self.forward_pass("ref_logprobs_BT", self.reference, fn))
        run_forward_passes(forward_passes, groups, ids, self.ctx.tokenizer.pad_id, self.need)

    def _rows(self, groups: Sequence[Group], ids: Sequence[int]) -> TrainingRows:
        per_token = tuple(next((g.per_token for g in groups if g.here), ()))
        return TrainingRows(groups, ids, self.ctx.tokenizer.pad_id, self.ctx.wide, per_token)
