"""Planted bugs of PPO, each a patch of one place in the room where it has been made before."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shardwise.engines.native import NativeEngine
from shardwise.losses import ppo as losses
from shardwise.stages import ppo
from shardwise.verify.walk import Task, Walked, walk
from tests.verify.bugs import Bug, _patch

PPO_BUGS: dict[str, Bug] = {}


def bug(layout: str) -> Callable[[Any], Any]:
    def add(plant: Any) -> Any:
        PPO_BUGS[plant.__name__] = Bug("llama", "ppo", layout, plant)
        return plant

    return add


def walk_with(name: str, task: Task) -> Walked:
    """`walk.walk` with a bug planted; runs on every rank."""
    with contextlib.ExitStack() as stack:
        for patch in PPO_BUGS[name].plant():
            stack.enter_context(patch)
        return walk(task)


@bug("dp2.zero2")
def whitening_per_rank() -> Iterator[Any]:
    real = ppo.whiten

    def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, total: Any = None) -> Tensor:
        return real(x, mask, shift_mean)

    yield _patch(ppo, "whiten", whiten)


@bug("dp2.zero2")
def gae_across_padding() -> Iterator[Any]:
    """What stands behind a completion goes on into it: the mask is not looked at."""
    real = ppo.gae

    def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
        last = torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        padded = torch.where(mask, values, last[:, None])
        return real(rewards, padded, torch.ones_like(mask), gamma, lam)

    yield _patch(ppo, "gae", gae)


@bug("tp2.sp")
def reward_on_padding() -> Iterator[Any]:
    real = ppo.token_rewards

    def token_rewards(score: Tensor, logp: Tensor, ref: Any, mask: Tensor, *rest: Any) -> Tensor:
        whole = torch.ones_like(mask)
        return real(score, logp, ref, whole, *rest)

    yield _patch(ppo, "token_rewards", token_rewards)


@bug("dp2.zero2")
def kl_with_the_wrong_sign() -> Iterator[Any]:
    real = ppo.token_rewards

    def token_rewards(score: Tensor, logp: Tensor, ref: Tensor, *rest: Any) -> Tensor:
        return real(score, ref, logp, *rest)

    yield _patch(ppo, "token_rewards", token_rewards)


@bug("dp2.zero2")
def reference_follows_the_actor() -> Iterator[Any]:
    real = ppo.PpoStage._read

    def read(self: Any, *args: Any) -> None:
        self.reference = self.engine
        real(self, *args)

    yield _patch(ppo.PpoStage, "_read", read)


@bug("dp2.zero2")
def old_logprobs_taken_after_the_first_update() -> Iterator[Any]:
    real = ppo.PolicyLoss.__call__

    def call(self: Any, logits: Any, batch: Any) -> Any:
        now = losses.valid_logprobs(logits, batch, self.temperature).detach()
        extras = {**batch.extras, "old_logprobs_BT": now}
        return real(self, logits, dataclasses.replace(batch, extras=extras))

    yield _patch(ppo.PolicyLoss, "__call__", call)


@bug("tp2.sp")
def value_clip_dropped() -> Iterator[Any]:
    real = losses.value_loss

    def value_loss(value: Tensor, old: Tensor, target: Tensor, clip: float | None) -> Tensor:
        return real(value, old, target, None)

    yield _patch(losses, "value_loss", value_loss)


@bug("dp2.zero2")
def values_of_the_critic_one_rollout_ago() -> Iterator[Any]:
    """Roles out of sync: the critic reads with weights that its updates have left behind."""
    real = ppo.PpoStage._read

    def read(self: Any, groups: Any, *args: Any) -> None:
        real(self, groups, *args)
        groups = [g for g in groups if g.here]
        now = [g.per_token["values_BT"] for g in groups]
        before = getattr(self, "before", now)
        self.before = now
        for group, values in zip(groups, before, strict=True):
            group.per_token["values_BT"] = [
                [0.0] * len(t) if len(v) != len(t) else v
                for v, t in zip(values, group.tokens, strict=True)
            ]

    yield _patch(ppo.PpoStage, "_read", read)


@bug("actor=dp1.zero0@0-0,critic=dp1.zero0@1-1")
def critic_skips_an_update_on_its_own_rank() -> Iterator[Any]:
    real = NativeEngine.step

    def step(self: Any, lr: float) -> float:
        skip = self.stage.endswith("critic") and self.updates == 1
        return real(self, 0.0 if skip else lr)

    yield _patch(NativeEngine, "step", step)


@bug("dp2.zero2")
def advantages_of_another_completion() -> Iterator[Any]:
    real = ppo._set_per_token

    def set_per_token(groups: Any, name: str, values: Tensor) -> None:
        real(groups, name, values.roll(1, dims=0) if name == "advantages_BT" else values)

    yield _patch(ppo, "_set_per_token", set_per_token)


@bug("dp2.zero2")
def truncated_completions_scored_like_whole_ones() -> Iterator[Any]:
    real = ppo.PpoStage._score

    def score(self: Any, group: Any) -> None:
        real(self, group)
        for i, stopped in enumerate(group.stopped):
            if not stopped and group.rewards[i] is not None:
                group.rewards[i] += self.config.loss.missing_eos_penalty

    yield _patch(ppo.PpoStage, "_score", score)
