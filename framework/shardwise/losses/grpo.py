"""The loss of the GRPO family over stored rollouts, as one configurable sum (design decision 2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.errors import ConfigError
from shardwise.losses.config import PolicyLossConfig
from shardwise.losses.contract import LossOutput, reads_valid
from shardwise.losses.kl import kl_estimate
from shardwise.losses.logprobs import valid_logprobs
from shardwise.losses.policy import (
    cispo,
    clipped_surrogate,
    extra,
    folded,
    log_ratio,
    masked_sum,
    means,
    ratio_metrics,
    sequence_log_ratio,
    truncated_importance,
)
from shardwise.ops.logits import Logits

# Shape suffixes: B rows, T tokens, V vocabulary.


class GRPOLoss:
    """Surrogate plus KL over rows of prompt and response; ``loss_mask_BT`` marks the response.

    Reads from ``batch.extras``, where only valid positions matter (NaN elsewhere is harmless):

    - ``advantages_BT``.
    - ``old_logprobs_BT``: at the start of the update, under ``temperature``. Without it the
      current ones are taken, which is exact for a single on-policy update.
    - ``ref_logprobs_BT``: only with ``kl``. ``rollout_logprobs_BT``: only with importance_cap.

    An unscorable completion, or one to leave out, has no True in its mask row.
    """

    def __init__(self, config: PolicyLossConfig, temperature: float = 1.0) -> None:
        if config.aggregation == "constant" and config.length_constant is None:
            raise ConfigError(
                "length_constant: aggregation 'constant' needs the longest response allowed"
            )
        self.config = config
        self.temperature = temperature
        self.weights: Mapping[str, float] = {"policy": 1.0}
        if config.kl != "none":
            self.weights = {"policy": 1.0, "kl": config.kl_coef}

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """Tokens or sequences, by the aggregation; the same for every term."""
        count = folded(self.config, batch)[1].sum()
        return dict.fromkeys(self.weights, count)

    @reads_valid
    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """Sums over this micro-batch, fp32 (fp64 for fp64 logits)."""
        config, mask_BT = self.config, batch.loss_mask_BT
        logp_BT = valid_logprobs(logits_BTV, batch, self.temperature)
        weight_BT = folded(config, batch)[0].to(logp_BT.dtype)
        old_BT = extra(batch, "old_logprobs_BT", logp_BT, default=logp_BT)
        advantages_BT = extra(batch, "advantages_BT", logp_BT)
        log_ratio_BT = log_ratio(logp_BT, old_BT)
        if config.ratio == "sequence":
            log_ratio_BT = sequence_log_ratio(log_ratio_BT, mask_BT, batch.segment_ids_BT)
        clip = (config.clip_low, config.clip_high)
        if config.ratio == "cispo":
            policy_BT = cispo(log_ratio_BT, logp_BT, advantages_BT, *clip)
        else:
            policy_BT = clipped_surrogate(log_ratio_BT, advantages_BT, *clip, config.dual_clip)
        figures = ratio_metrics(log_ratio_BT, advantages_BT, *clip)
        figures["entropy_estimate"] = -logp_BT.detach()
        if config.importance_cap is not None:
            figures["importance_mean"] = self._importance(batch, old_BT, config.importance_cap)
            policy_BT = policy_BT * figures["importance_mean"]
        sums = {"policy": masked_sum(policy_BT * weight_BT, mask_BT)}
        if config.kl != "none":
            kl_BT = kl_estimate(config.kl, logp_BT, extra(batch, "ref_logprobs_BT", logp_BT))
            sums["kl"] = masked_sum(kl_BT * weight_BT, mask_BT)
            figures["kl"] = kl_BT.detach()
        return LossOutput(sums, means(figures, mask_BT))

    def _importance(self, batch: MicroBatch, old_BT: Tensor, cap: float) -> Tensor:
        rollout_BT = extra(batch, "rollout_logprobs_BT", old_BT)
        level, segments_BT = self.config.importance_level, batch.segment_ids_BT
        return truncated_importance(old_BT, rollout_BT, batch.loss_mask_BT, cap, level, segments_BT)
