"""The loss of the GRPO family over stored rollouts, as one configurable sum (design decision 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shardwise.config.schema import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section
from shardwise.data.batch import MicroBatch
from shardwise.errors import ConfigError
from shardwise.losses.advantages import AdvantageKind
from shardwise.losses.aggregate import Aggregation, fold
from shardwise.losses.contract import LossOutput
from shardwise.losses.kl import kl_estimate
from shardwise.losses.logprobs import valid_logprobs
from shardwise.losses.policy import (
    cispo,
    clipped_surrogate,
    log_ratio,
    ratio_metrics,
    sequence_log_ratio,
    truncated_importance,
)
from shardwise.losses.presets import PRESETS
from shardwise.ops.logits import Logits

# Shape suffixes: B rows, T tokens, V vocabulary.


class PolicyLossConfig(Section):
    """Advantage, ratio, clipping, KL and aggregation. A preset fills what is not given."""

    preset: (
        Literal["grpo_deepseekmath", "dapo_paper", "dr_grpo", "gspo", "trl_default", "verl_default"]
        | None
    ) = Field(None, description="published settings, see shardwise.losses.presets")
    advantage: AdvantageKind = "group_std"
    advantage_eps: NonNegativeFloat = Field(1e-6, description="added to a group's std")
    ratio: Literal["token", "sequence", "cispo"] = "token"
    clip_low: Fraction = Field(0.2, description="the ratio's lower bound is 1 - clip_low")
    clip_high: NonNegativeFloat = Field(0.2, description="its upper bound is 1 + clip_high")
    dual_clip: Annotated[float, Field(gt=1.0)] | None = Field(
        None, description="bound of the loss for negative advantages, in units of -A"
    )
    kl: Literal["none", "k1", "k2", "k3"] = Field(
        "none", description="estimator in the loss; k2 has the on-policy gradient of the KL"
    )
    kl_coef: NonNegativeFloat = 0.0
    aggregation: Aggregation = "token_mean"
    length_constant: PositiveInt | None = Field(
        None, description="aggregation constant: the longest response allowed, in tokens"
    )
    importance_cap: PositiveFloat | None = Field(
        None, description="truncate trainer/sampler importance weights here; None: no correction"
    )
    importance_level: Literal["token", "sequence"] = "token"

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") in PRESETS:
            return {**PRESETS[data["preset"]].settings, **data}
        return data

    @model_validator(mode="after")
    def _kl_is_whole(self) -> PolicyLossConfig:
        if self.kl_coef > 0 and self.kl == "none":
            raise ValueError("kl_coef is set but kl is none; choose kl: k1, k2 or k3")
        if self.kl != "none" and self.kl_coef == 0:
            raise ValueError(f"kl is {self.kl} but kl_coef is 0; set kl_coef, or kl: none")
        return self


class GRPOLoss:
    """Surrogate plus KL over rows of prompt and response; ``loss_mask_BT`` marks the response.

    Reads from ``batch.extras``, where only valid positions matter (NaN elsewhere is harmless):

    - ``advantages_BT``, or ``advantages_B`` where every row holds one sequence.
    - ``old_logprobs_BT``: at the start of the update, under ``temperature``. Without it the
      current ones are taken, which is exact for a single on-policy update.
    - ``ref_logprobs_BT``: only with ``kl``. ``rollout_logprobs_BT``: only with importance_cap.
    - ``weight_BT``, ``count_BT`` (both or neither): from `aggregate.fold`, for sequences that are
      cut over ranks; otherwise folded here from mask and segments.

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
        count = self._fold(batch)[1].sum()
        return dict.fromkeys(self.weights, count)

    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """Sums over this micro-batch, fp32 (fp64 for fp64 logits)."""
        config, mask_BT = self.config, batch.loss_mask_BT
        logp_BT = valid_logprobs(logits_BTV, batch, self.temperature)
        weight_BT = self._fold(batch)[0].to(logp_BT.dtype)
        old_BT = self._extra(batch, "old_logprobs_BT", default=logp_BT.detach())
        advantages_BT = self._advantages(batch).to(logp_BT.dtype)
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
        sums = {"policy": _masked_sum(policy_BT * weight_BT, mask_BT)}
        if config.kl != "none":
            kl_BT = kl_estimate(config.kl, logp_BT, self._extra(batch, "ref_logprobs_BT"))
            sums["kl"] = _masked_sum(kl_BT * weight_BT, mask_BT)
            figures["kl"] = kl_BT.detach()
        number = mask_BT.sum(dtype=torch.float64)
        metrics = {k: (_masked_sum(v.double(), mask_BT), number) for k, v in figures.items()}
        return LossOutput(sums, metrics)

    def _fold(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        if "weight_BT" in batch.extras:
            mask_BT = batch.loss_mask_BT
            weight_BT, count_BT = batch.extras["weight_BT"], batch.extras["count_BT"]
            zero = weight_BT.new_zeros(())
            return torch.where(mask_BT, weight_BT, zero), torch.where(mask_BT, count_BT, zero)
        return fold(
            self.config.aggregation,
            batch.loss_mask_BT,
            batch.segment_ids_BT,
            self.config.length_constant,
        )

    def _importance(self, batch: MicroBatch, old_BT: Tensor, cap: float) -> Tensor:
        rollout_BT = self._extra(batch, "rollout_logprobs_BT")
        level, segments_BT = self.config.importance_level, batch.segment_ids_BT
        return truncated_importance(old_BT, rollout_BT, batch.loss_mask_BT, cap, level, segments_BT)

    def _advantages(self, batch: MicroBatch) -> Tensor:
        if "advantages_BT" in batch.extras:
            return self._extra(batch, "advantages_BT")
        if batch.segment_ids_BT is not None:
            raise ValueError("packed rows hold several sequences: give extras['advantages_BT']")
        if "advantages_B" not in batch.extras:
            raise ValueError("GRPOLoss needs extras['advantages_BT'] or extras['advantages_B']")
        rows_BT = batch.extras["advantages_B"][:, None].expand(batch.loss_mask_BT.shape)
        return torch.where(batch.loss_mask_BT, rows_BT, 0.0)

    def _extra(self, batch: MicroBatch, name: str, default: Tensor | None = None) -> Tensor:
        """A detached [B, T] extra with zeros at masked positions: selected, never multiplied."""
        value_BT = batch.extras.get(name, default)
        if value_BT is None:
            raise ValueError(f"GRPOLoss needs extras[{name!r}] with this config")
        return torch.where(batch.loss_mask_BT, value_BT.detach(), 0.0)


def _masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, x_BT, 0.0).sum()
