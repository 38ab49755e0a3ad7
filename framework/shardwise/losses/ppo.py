"""The two losses of PPO over stored rollouts, and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shardwise.config.schema import Fraction, NonNegativeFloat, PositiveFloat
from shardwise.data.batch import MicroBatch
from shardwise.losses.contract import LossOutput
from shardwise.losses.kl import kl_estimate
from shardwise.losses.logprobs import valid_logprobs
from shardwise.losses.policy import (
    SurrogateConfig,
    clipped_surrogate,
    extra,
    log_ratio,
    masked_sum,
    means,
    ratio_metrics,
)
from shardwise.losses.presets import PPO_PRESETS
from shardwise.ops.logits import Logits, selected_values

# Shape suffixes: B rows, T tokens, V vocabulary.


class PpoLossConfig(SurrogateConfig):
    """Rewards, advantages and objective, besides `SurrogateConfig`."""

    presets = PPO_PRESETS

    preset: Literal["ziegler_2019", "trl_default", "verl_default", "openrlhf_default"] | None = (
        Field(None, description="published settings, see shardwise.losses.presets")
    )
    objective: Literal["clip", "kl_penalty"] = "clip"
    penalty_coef: PositiveFloat = Field(1.0, description="kl_penalty: weight of KL(old || new)")
    penalty_target: PositiveFloat | None = Field(
        None, description="kl_penalty: adapt the weight to this KL a token; none: fixed"
    )
    value_clip: PositiveFloat | None = Field(0.2, description="none: values are not clipped")
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    kl: Literal["k1", "k2", "k3"] = Field("k1", description="estimator in the reward")
    kl_coef: NonNegativeFloat = Field(0.05, description="0: no reference model")
    kl_target: PositiveFloat | None = Field(
        None, description="adapt kl_coef to this KL a response, in nats; none: fixed"
    )
    kl_gain: PositiveFloat = Field(0.1, description="how fast kl_coef adapts")
    whiten_advantages: bool = True
    whiten_rewards: bool = Field(False, description="scale rewards to unit variance, keep the mean")
    missing_eos_penalty: NonNegativeFloat = Field(
        0.0, description="taken off the score of a completion that did not stop by itself"
    )

    @model_validator(mode="after")
    def _consistent(self) -> PpoLossConfig:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target adapts kl_coef, which is 0; give it a start")
        return self


class PolicyLoss:
    """PPO's policy term; reads ``old_logprobs_BT`` and ``advantages_BT`` at the valid tokens.

    ``clip``: Schulman et al. 2017, equation 7. ``kl_penalty``: equation 8, -r A + beta KL(old ||
    new), where the KL is k3 of the other direction, r - log r - 1, whose mean and gradient under
    the old policy are the KL's own.
    """

    def __init__(self, config: PpoLossConfig, temperature: float = 1.0) -> None:
        self.config, self.temperature = config, temperature
        self.weights: Mapping[str, float] = {"policy": 1.0}
        if config.objective == "kl_penalty":
            self.weights = {"policy": 1.0, "penalty": config.penalty_coef}

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """Tokens or sequences, by the aggregation; the same for every term."""
        return dict.fromkeys(self.weights, self.config.fold(batch)[1].sum())

    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """Sums over this micro-batch, fp32 (fp64 for fp64 logits)."""
        config, mask_BT = self.config, batch.loss_mask_BT
        logp_BT = valid_logprobs(logits_BTV, batch, self.temperature)
        weight_BT = config.fold(batch)[0].to(logp_BT.dtype)
        old_BT = extra(batch, "old_logprobs_BT", logp_BT)
        advantages_BT = extra(batch, "advantages_BT", logp_BT)
        log_ratio_BT = log_ratio(logp_BT, old_BT)
        clip = (config.clip_low, config.clip_high)
        sums = {}
        if config.objective == "clip":
            loss_BT = clipped_surrogate(log_ratio_BT, advantages_BT, *clip, config.dual_clip)
        else:
            loss_BT = clipped_surrogate(log_ratio_BT, advantages_BT, 1.0, float("inf"))
            penalty_BT = kl_estimate("k3", old_BT, logp_BT)
            sums["penalty"] = masked_sum(penalty_BT * weight_BT, mask_BT)
        sums["policy"] = masked_sum(loss_BT * weight_BT, mask_BT)
        figures = ratio_metrics(log_ratio_BT, advantages_BT, *clip)
        figures["entropy_estimate"] = -logp_BT.detach()
        return LossOutput(sums, means(figures, mask_BT))


class ValueLoss:
    """PPO's value term over a scalar head; reads ``values_BT`` (old) and ``returns_BT``.

    0.5 max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2): the clipping of the PPO
    implementation that Huang et al. 2024 describe, "The N+ Implementation Details of RLHF".
    """

    weights: Mapping[str, float]

    def __init__(self, config: PpoLossConfig) -> None:
        self.config = config
        self.weights = {"value": 1.0}

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """As `PolicyLoss.counts`."""
        return {"value": self.config.fold(batch)[1].sum()}

    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """Sums over this micro-batch."""
        mask_BT = batch.loss_mask_BT
        value_BT = selected_values(logits_BTV, mask_BT)
        old_BT = extra(batch, "values_BT", value_BT)
        return_BT = extra(batch, "returns_BT", value_BT)
        loss_BT = value_loss(value_BT, old_BT, return_BT, self.config.value_clip)
        weight_BT = self.config.fold(batch)[0].to(value_BT.dtype)
        moved_BT = (value_BT.detach() - old_BT).abs()
        clipped_BT = moved_BT > (self.config.value_clip or float("inf"))
        figures = {"value_mean": value_BT.detach(), "value_clip_fraction": clipped_BT}
        sums = {"value": masked_sum(loss_BT * weight_BT, mask_BT)}
        return LossOutput(sums, means(figures, mask_BT))


def value_loss(value_BT: Tensor, old_BT: Tensor, return_BT: Tensor, clip: float | None) -> Tensor:
    """See `ValueLoss`; per token."""
    loss_BT = (value_BT - return_BT).square()
    if clip is not None:
        near_BT = old_BT + (value_BT - old_BT).clamp(-clip, clip)
        loss_BT = torch.maximum(loss_BT, (near_BT - return_BT).square())
    return 0.5 * loss_BT
