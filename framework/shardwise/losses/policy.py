"""Policy-gradient surrogates per token. Inputs are valid everywhere: the caller selects first.

r = exp(logp - logp_old) is the importance ratio, A the advantage. All return losses to minimise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.aggregate import fold, sequence_sum
from shardwise.losses.config import SurrogateConfig
from shardwise.losses.kl import kl_estimate

# Shape suffixes: B rows, T tokens.

_MAX_LOG_RATIO = 20.0  # beyond it a token is lost anyway; keeps the exponential finite


def folded(config: SurrogateConfig, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """See `aggregate.fold`."""
    return fold(
        config.aggregation, batch.loss_mask_BT, batch.segment_ids_BT, config.length_constant
    )


def extra(batch: MicroBatch, name: str, like: Tensor, default: Tensor | None = None) -> Tensor:
    """A detached [B, T] extra with zeros at masked positions: selected, never multiplied."""
    value_BT = batch.extras.get(name, default)
    if value_BT is None:
        raise ValueError(f"this loss needs extras[{name!r}] with this config")
    return torch.where(batch.loss_mask_BT, value_BT.detach(), 0.0).to(like.dtype)


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Over the valid tokens; what stands elsewhere may be NaN."""
    return torch.where(mask_BT, x_BT, 0.0).sum()


def means(figures: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics: the sum of each figure over the valid tokens, and their number, in float64."""
    number = mask_BT.sum(dtype=torch.float64)
    return {k: (masked_sum(v.double(), mask_BT), number) for k, v in figures.items()}


def log_ratio(logp_BT: Tensor, old_logp_BT: Tensor) -> Tensor:
    """Per-token log r."""
    return logp_BT - old_logp_BT


def sequence_log_ratio(
    log_ratio_BT: Tensor, mask_BT: Tensor, segment_ids_BT: Tensor | None = None
) -> Tensor:
    """GSPO's log s: the mean log r over a sequence's valid tokens, at each of its tokens.

    Zheng et al. 2025, "Group Sequence Policy Optimization", equation 7. With one advantage per
    sequence its gradient equals that of the paper's GSPO-token (equation 14).
    """
    selected_BT = torch.where(mask_BT, log_ratio_BT, 0.0)
    length_BT = sequence_sum(mask_BT.to(log_ratio_BT.dtype), segment_ids_BT).clamp(min=1.0)
    return sequence_sum(selected_BT, segment_ids_BT) / length_BT


def clipped_surrogate(
    log_ratio_BT: Tensor,
    advantages_BT: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A), for A < 0 at most -dual_clip A.

    PPO (Schulman et al. 2017, equation 7), asymmetric bounds as in DAPO (Yu et al. 2025,
    equation 10), dual clip from Ye et al. 2020, "Mastering Complex Control", dual-clip PPO.
    """
    ratio_BT = _ratio(log_ratio_BT)
    clipped_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_BT = torch.maximum(-ratio_BT * advantages_BT, -clipped_BT * advantages_BT)
    if dual_clip is None:
        return loss_BT
    bounded_BT = torch.minimum(loss_BT, -dual_clip * advantages_BT)
    return torch.where(advantages_BT < 0, bounded_BT, loss_BT)


def cispo(
    log_ratio_BT: Tensor, logp_BT: Tensor, advantages_BT: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """-stopgrad(clip(r, 1 - clip_low, 1 + clip_high)) A logp.

    MiniMax 2025, "MiniMax-M1", equations 4 and 5: it clips the weight, so no token loses its
    gradient.
    """
    weight_BT = _ratio(log_ratio_BT.detach()).clamp(1.0 - clip_low, 1.0 + clip_high)
    return -weight_BT * advantages_BT * logp_BT


def truncated_importance(
    old_logp_BT: Tensor,
    rollout_logp_BT: Tensor,
    mask_BT: Tensor,
    cap: float,
    level: Literal["token", "sequence"] = "token",
    segment_ids_BT: Tensor | None = None,
) -> Tensor:
    """min(exp(old - rollout), cap), detached: corrects for a sampler that is not the trainer.

    Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    ``sequence`` weighs each token by the ratio of its whole sequence's probabilities.
    """
    gap_BT = torch.where(mask_BT, old_logp_BT - rollout_logp_BT, 0.0).detach()
    if level == "sequence":
        gap_BT = sequence_sum(gap_BT, segment_ids_BT)
    return _ratio(gap_BT).clamp(max=cap)


def ratio_metrics(
    log_ratio_BT: Tensor, advantages_BT: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """Per-token figures of how far the policy has moved, without gradient.

    ``approx_kl`` is k3 of KL(old || new); ``clip_fraction`` marks tokens whose clip binds, that
    is, whose ratio left the bounds in the direction that its advantage pays for.
    """
    log_ratio_BT = log_ratio_BT.detach()
    ratio_BT = _ratio(log_ratio_BT)
    low_BT = (ratio_BT < 1.0 - clip_low) & (advantages_BT < 0)
    high_BT = (ratio_BT > 1.0 + clip_high) & (advantages_BT > 0)
    return {
        "ratio_mean": ratio_BT,
        "approx_kl": kl_estimate("k3", torch.zeros_like(log_ratio_BT), log_ratio_BT),
        "clip_fraction": low_BT | high_BT,
        "clip_low_fraction": low_BT,
        "clip_high_fraction": high_BT,
    }


def _ratio(log_ratio_BT: Tensor) -> Tensor:
    return log_ratio_BT.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
