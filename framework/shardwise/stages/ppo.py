"""PPO: an actor, its critic, a reference and a reward model, each a role with its own layout.

One step: sample completions of fresh problems from the actor, score them by a verifier, a reward
model or both, turn scores and the KL to the reference into advantages with the critic's values,
and update actor and critic over mini-batches, several times. Everything is a pure function of
(seed, step), so a run resumes exactly. Prompts stand in a row once, with all their completions
(`data.groups`); the critic's value of a state stands where the actor predicts from that state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.engines.base import Engine
from shardwise.losses.advantages import rewards_tensor, whiten
from shardwise.losses.config import PpoLossConfig
from shardwise.losses.gae import (
    KLController,
    PenaltyController,
    explained_variance,
    gae,
    token_rewards,
)
from shardwise.losses.ppo import PolicyLoss, ValueLoss
from shardwise.losses.scores import score_of
from shardwise.rewards import is_usable
from shardwise.stages.base import StageContext, mean_metrics, role_of
from shardwise.stages.data_shards import local_batches
from shardwise.stages.groups import Group
from shardwise.stages.policy import PolicyStage
from shardwise.stages.ppo_config import PpoConfig
from shardwise.stages.rollouts import (
    Logprobs,
    TrainingRows,
    fractions,
    rollout_metrics,
    run_forward_passes,
    values_of,
    weigh_scores,
)
from shardwise.stages.row_holders import Sums

# Shape suffixes: C completions of a step, T tokens of the longest.

ACTOR_TRACKS = ("old_logprobs_BT", "advantages_BT")
CRITIC_TRACKS = ("values_BT", "returns_BT")


class PpoStage(PolicyStage):
    """See `PpoConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        super().__init__(ctx)
        config: PpoConfig = ctx.stage
        critic = role_of(config, "critic")
        self.critic: Engine = ctx.engine(critic.optimizer or config.optimizer, "critic")
        ctx.load_initial_weights(self.critic, "critic")
        self.critic_lr = (critic.optimizer or config.optimizer).lr / config.optimizer.lr
        self.reference = self.frozen("reference") if config.loss.kl_coef else None
        self.reward_model = self.frozen("reward") if config.reward_model_weight else None
        loss = self.loss_with_length(config.loss)
        self.loss = PolicyLoss(loss, config.sampling.temperature)
        self.value_loss = ValueLoss(loss)
        self.kl = KLController(loss.kl_coef, loss.kl_target, loss.kl_gain)
        self.penalty = PenaltyController(loss.penalty_coef, loss.penalty_target)
        frozen = [e for e in (self.reference, self.reward_model) if e is not None]
        learn = [self.engine, self.critic]
        self.deal_rows(learn=learn, read=[*learn, *frozen])
        self.sums = Sums(self.need, dist.get_rank())
        self.data_hash = self.initial_weights_hash(
            {"critic": self.critic, "reference": self.reference, "reward": self.reward_model}
        )

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """Roll out, score, update actor and critic ``updates * epochs`` times."""
        config: PpoConfig = self.config
        groups, ids = self.roll_out(step)
        self._read(groups, ids)
        metrics = self._add_experience(groups)
        if not self.experienced(step, groups):
            return metrics
        return metrics | self._update(groups, ids, lr, step >= config.critic_warmup_steps)

    def others(self) -> dict[str, Engine]:
        """The critic is saved with the actor."""
        return {"critic": self.critic}

    def state_dict(self) -> dict[str, Any]:
        """Where the controllers stand."""
        return super().state_dict() | {
            "kl": self.kl.state_dict(),
            "penalty": self.penalty.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        super().load_state_dict(state)
        self.kl.load_state_dict(state["kl"])
        self.penalty.load_state_dict(state["penalty"])

    # --- one step -------------------------------------------------------------------------------

    def _read(self, groups: list[Group], ids: Sequence[int]) -> None:
        """What every role has to say of the rollout, by the weights that wrote it."""
        logprobs = Logprobs(self.config.sampling.temperature)
        forward_passes = [
            self.forward_pass("old_logprobs_BT", self.engine, logprobs),
            self.forward_pass("values_BT", self.critic, values_of),
        ]
        if self.reference is not None:
            found = self.forward_pass("ref_logprobs_BT", self.reference, logprobs)
            forward_passes.append(found)
        if self.reward_model is not None:
            score = score_of(self.config.reward_steps, self.ctx.tokenizer)
            forward_passes.append(
                self.forward_pass("model_score", self.reward_model, values_of, score)
            )
        run_forward_passes(forward_passes, groups, ids, self.ctx.tokenizer.pad_id, self.need)

    def _add_experience(self, groups: list[Group]) -> dict[str, float]:
        """Scores to rewards to advantages and returns, in float64.

        Of the rows that this rank holds; what is summed is summed over the global batch.
        """
        loss: PpoLossConfig = self.config.loss
        for group in groups:
            self._score(group)
        here = [g for g in groups if g.here]
        mask_CT = _pad([[np.full(len(t), r is not None) for t, r in _pairs(g)] for g in here])
        mask_CT = mask_CT.bool()
        logp_CT, values_CT = (_per_token(here, n) for n in ("old_logprobs_BT", "values_BT"))
        ref_CT = None if self.reference is None else _per_token(here, "ref_logprobs_BT")
        score_C = rewards_tensor([g.rewards for g in here]).nan_to_num().reshape(-1)

        def total(values_CT: Tensor) -> float:
            """Of all valid tokens of the global batch; a collective call."""
            rows = np.cumsum([len(g.tokens) for g in here])[:-1].tolist()
            cuts = zip(values_CT.tensor_split(rows), mask_CT.tensor_split(rows), strict=True)
            return self.sums.of([values[mask].numpy() for values, mask in cuts])

        rewards_CT = token_rewards(score_C, logp_CT, ref_CT, mask_CT, self.kl.coef, loss.kl)
        if loss.whiten_rewards:
            rewards_CT = whiten(rewards_CT, mask_CT, False, total)
        advantages_CT, returns_CT = gae(rewards_CT, values_CT, mask_CT, loss.gamma, loss.lam)
        explained = explained_variance(values_CT, returns_CT, mask_CT, total)
        if loss.whiten_advantages:
            advantages_CT = whiten(advantages_CT, mask_CT, total=total)
        _set_per_token(here, "advantages_BT", advantages_CT)
        _set_per_token(here, "returns_BT", returns_CT)
        means = {"return_mean": (total(returns_CT), total(mask_CT.double()))}
        for name in ("verifier", "model_score"):
            found = [float(s) for g in groups for s in g.per_token.get(name, []) if is_usable(s)]
            means[f"{name}_mean"] = (sum(found), len(found))
        metrics = rollout_metrics(groups) | fractions(means)
        scored = sum(r is not None for g in groups for r in g.rewards)
        if scored:
            metrics["explained_variance"] = explained
        if ref_CT is not None:
            kl = fractions({"kl_response": (total(logp_CT - ref_CT), scored)})
            metrics |= kl | {"kl_coef": self.kl.coef}
            for value in kl.values():
                self.kl.update(value)
        return metrics

    def _score(self, group: Group) -> None:
        """See `weigh_scores`."""
        config: PpoConfig = self.config
        weights = config.verifier_weight, config.reward_model_weight
        weigh_scores(group, *weights, config.loss.missing_eos_penalty)

    def _update(
        self, groups: list[Group], ids: Sequence[int], lr: float, with_actor: bool
    ) -> dict[str, float]:
        """All updates of a step. Actor and critic talk to nobody, so disjoint ranks overlap."""
        config: PpoConfig = self.config
        micro = config.batch.micro_batch
        if "penalty" in self.loss.weights:
            self.loss.weights = {"policy": 1.0, "penalty": self.penalty.coef}
        jobs: list[tuple[list[Any], list[Any]]] = []
        for part in self.mini_batches(groups):
            rows = (groups[part], ids[part], self.ctx.tokenizer.pad_id, self.ctx.wide)
            actor = TrainingRows(*rows, ACTOR_TRACKS)
            critic = TrainingRows(*rows, CRITIC_TRACKS)
            jobs.append(
                (
                    local_batches(actor, self.engine, micro),
                    local_batches(critic, self.critic, micro),
                )
            )
        actors, critics = [], []
        for _ in range(config.epochs_per_rollout):
            for actor_batches, critic_batches in jobs:
                if with_actor:
                    found = self.engine.forward_backward(actor_batches, self.loss, lr)
                    actors.append(found | {"grad_norm": self.engine.step(lr)})
                own_lr = lr * self.critic_lr
                found = self.critic.forward_backward(critic_batches, self.value_loss, own_lr)
                norm = self.critic.step(own_lr)
                critics.append(found | {"critic_grad_norm": norm})
        last, metrics = self.engine.broadcast([actors[-1:], mean_metrics(actors)])
        if last and "approx_kl" in last[0]:
            self.penalty.update(last[0]["approx_kl"])
        of_critic: dict[str, float] = self.critic.broadcast(mean_metrics(critics))
        of_critic["loss_value"] = of_critic.pop("loss")
        result: dict[str, float] = {"loss": of_critic["loss_value"]} | of_critic | metrics
        if not np.isfinite(of_critic["critic_grad_norm"]):
            result["grad_norm"] = of_critic["critic_grad_norm"]
        return result


def _pairs(group: Group) -> list[tuple[list[int], float | None]]:
    return list(zip(group.tokens, group.rewards, strict=True))


def _pad(per_completion: Sequence[Sequence[np.ndarray]]) -> Tensor:
    """Arrays of the completions of all groups as one float64 [C, T], zeros behind each."""
    flat = [a for of_group in per_completion for a in of_group]
    out = np.zeros((len(flat), max(map(len, flat), default=1)))
    for row, values in zip(out, flat, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(out)


def _per_token(groups: Sequence[Group], name: str) -> Tensor:
    return _pad([g.per_token[name] for g in groups])


def _set_per_token(groups: Sequence[Group], name: str, values_CT: Tensor) -> None:
    rows = iter(values_CT.numpy())
    for group in groups:
        group.per_token[name] = [next(rows)[: len(t)].copy() for t in group.tokens]
