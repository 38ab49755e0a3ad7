"""The two losses of PPO over stored rollouts, and their settings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.config import PpoLossConfig
from shardwise.losses.contract import LossOutput, reads_valid
from shardwise.losses.kl import kl_estimate
from shardwise.losses.logprobs import valid_logprobs
from shardwise.losses.policy import (
    clipped_surrogate,
    extra,
    folded,
    log_ratio,
    masked_sum,
    means,
    ratio_metrics,
)
from shardwise.ops.logits import Logits, selected_values

# Shape suffixes: B rows, T tokens, V vocabulary.


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
        return dict.fromkeys(self.weights, folded(self.config, batch)[1].sum())

    @reads_valid
    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """Sums over this micro-batch, fp32 (fp64 for fp64 logits)."""
        config, mask_BT = self.config, batch.loss_mask_BT
        logp_BT = valid_logprobs(logits_BTV, batch, self.temperature)
        weight_BT = folded(config, batch)[0].to(logp_BT.dtype)
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
        return {"value": folded(self.config, batch)[1].sum()}

    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """Sums over this micro-batch."""
        mask_BT = batch.loss_mask_BT
        value_BT = selected_values(logits_BTV, mask_BT)
        old_BT = extra(batch, "values_BT", value_BT)
        return_BT = extra(batch, "returns_BT", value_BT)
        loss_BT = value_loss(value_BT, old_BT, return_BT, self.config.value_clip)
        weight_BT = folded(self.config, batch)[0].to(value_BT.dtype)
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
