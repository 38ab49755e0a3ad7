"""Online DPO: the policy writes the answers, a verifier or reward model ranks them.

Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback". One step: sample answers
of fresh problems from the current weights, score them, and update on the better against the worse
of each prompt, by any preference loss that compares answers. Answers of equal score are no pair.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.engines.base import Engine
from shardwise.losses.preference import PreferenceLoss
from shardwise.losses.scores import score_of
from shardwise.stages.base import REFERENCE, StageContext, mean_metrics
from shardwise.stages.data_shards import local_batches
from shardwise.stages.groups import Group
from shardwise.stages.online_dpo_config import OnlineDpoConfig
from shardwise.stages.policy import PolicyStage
from shardwise.stages.rollouts import (
    Logprobs,
    TrainingRows,
    fractions,
    rollout_metrics,
    run_forward_passes,
    values_of,
    weigh_scores,
)


class OnlineDpoStage(PolicyStage):
    """See `OnlineDpoConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        super().__init__(ctx)
        config: OnlineDpoConfig = ctx.stage
        self.loss = PreferenceLoss(config.loss, config.loss.with_reference)
        self.reference: Engine | None = None
        self.reward_model: Engine | None = None
        if config.loss.with_reference:
            self.reference = self.frozen(REFERENCE)
        if config.reward_model_weight:
            self.reward_model = self.frozen("reward")
        roles = {REFERENCE: self.reference, "reward": self.reward_model}
        self.deal_rows(learn=[self.engine], read=[e for e in roles.values() if e is not None])
        self.data_hash = self.initial_weights_hash(roles)

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """Roll out, rank, update ``updates_per_rollout * epochs_per_rollout`` times."""
        config: OnlineDpoConfig = self.config
        groups, ids = self.roll_out(step)
        self._read(groups, ids)
        for group in groups:
            weigh_scores(group, config.verifier_weight, config.reward_model_weight)
            group.per_token["rating_BT"] = [r or 0.0 for r in group.rewards]
        pairs = sum(map(has_pair, groups))
        metrics = rollout_metrics(groups) | fractions({"pair_fraction": (pairs, len(groups))})
        if not self.experienced(step, groups):
            return metrics
        per_token = ("rating_BT", *(["ref_logprobs_BT"] if self.reference is not None else []))
        pad, wide, micro = self.ctx.tokenizer.pad_id, self.ctx.wide, config.batch.micro_batch
        chunks = [
            local_batches(
                TrainingRows(groups[part], ids[part], pad, wide, per_token), self.engine, micro
            )
            for part in self.mini_batches(groups)
            if any(map(has_pair, groups[part]))
        ]
        updates = []
        for _ in range(config.epochs_per_rollout):
            for batches in chunks:
                update = self.engine.forward_backward(batches, self.loss, lr)
                updates.append(update | {"grad_norm": self.engine.step(lr)})
        found: dict[str, float] = self.engine.broadcast(mean_metrics(updates))
        return metrics | found

    def _read(self, groups: list[Group], ids: Sequence[int]) -> None:
        """What reference and reward model say of the answers."""
        forward_passes = []
        if self.reference is not None:
            fn = Logprobs(1.0)
            forward_passes.append(self.forward_pass("ref_logprobs_BT", self.reference, fn))
        if self.reward_model is not None:
            score = score_of(self.config.reward_steps, self.ctx.tokenizer)
            forward_passes.append(
                self.forward_pass("model_score", self.reward_model, values_of, score)
            )
        run_forward_passes(forward_passes, groups, ids, self.ctx.tokenizer.pad_id, self.need)


def has_pair(group: Group) -> bool:
    """Whether two of its answers have scores that differ."""
    return len({r for r in group.rewards if r is not None}) > 1
