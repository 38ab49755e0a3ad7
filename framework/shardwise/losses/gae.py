"""From scores to advantages with a critic, in float64: no model, no gradient, once per rollout.

One row is one completion; ``mask_BT`` marks its own tokens (not padding, not a tool's output).
Where numbers of several rows meet, hand in the whole global batch, or a ``total`` over it: nothing
here may depend on how it was cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardwise.losses.advantages import Total
from shardwise.losses.kl import KLEstimator, kl_estimate

# Shape suffixes: B completions, T tokens.


def token_rewards(
    score_B: Tensor,
    logp_BT: Tensor,
    ref_logp_BT: Tensor | None,
    mask_BT: Tensor,
    kl_coef: float = 0.0,
    estimator: KLEstimator = "k1",
) -> Tensor:
    """-kl_coef times the KL estimate at every token, and the score at the last valid one.

    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", equation 2, spread
    over the tokens as in Stiennon et al. 2020, appendix B.2: R = r(x, y) - beta log(pi / rho).
    """
    rewards_BT = torch.zeros_like(logp_BT)
    if ref_logp_BT is not None:
        rewards_BT = -kl_coef * kl_estimate(estimator, logp_BT, ref_logp_BT)
    index_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = torch.where(mask_BT, index_T, -1).amax(dim=1)
    at_end_BT = (index_T == last_B[:, None]) & mask_BT
    rewards_BT = rewards_BT + torch.where(at_end_BT, score_B[:, None], 0.0)
    return torch.where(mask_BT, rewards_BT, 0.0)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns): generalized advantage estimation, 0 outside of the mask.

    Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", equations 11, 12 and 16:
    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}; R = A + V. Tokens
    outside of the mask carry the next value and advantage through; after the last one both are 0.
    """
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B, advantage_B = (torch.zeros_like(values_BT[:, 0]) for _ in range(2))
    for t in range(values_BT.shape[1] - 1, -1, -1):
        valid_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = torch.where(valid_B, delta_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(valid_B, values_BT[:, t], next_value_B)
        advantages_BT[:, t] = torch.where(valid_B, advantage_B, 0.0)
    returns_BT = torch.where(mask_BT, advantages_BT + values_BT, 0.0)
    return advantages_BT, returns_BT


def explained_variance(
    values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, total: Total = torch.sum
) -> float:
    """1 - Var(R - V) / Var(R) over the valid tokens; 0 where the returns are all alike."""
    number = max(float(total(mask_BT.double())), 1.0)

    def squares(x_BT: Tensor) -> float:
        mean = total(torch.where(mask_BT, x_BT, 0.0)) / number
        return float(total(torch.where(mask_BT, x_BT - mean, 0.0).square()))

    spread = squares(returns_BT)
    return 1.0 - squares(returns_BT - values_BT) / spread if spread else 0.0


@dataclasses.dataclass
class KLController:
    """The KL penalty's coefficient, fixed without a target, else steered towards it.

    Ziegler et al. 2019, section 2.2: e = clip((KL - target) / target, -0.2, 0.2), and
    coefficient *= 1 + gain e, where KL is the mean over the responses of the sum over their
    tokens; their gain is 0.1.
    """

    coef: float
    target: float | None = None
    gain: float = 0.1

    def update(self, kl: float) -> None:
        """After a rollout with this KL."""
        if self.target is not None:
            error = min(max((kl - self.target) / self.target, -0.2), 0.2)
            self.coef *= 1.0 + self.gain * error

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self.coef = float(state["coef"])


@dataclasses.dataclass
class PenaltyController:
    """The coefficient of the KL-penalty objective.

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", section 4: after an update
    that moved the policy by KL d, halve it if d < target / 1.5, double it if d > 1.5 target.
    """

    coef: float
    target: float | None = None

    def update(self, kl: float) -> None:
        """After the updates of a rollout, with the last one's KL(old || new)."""
        if self.target is None:
            return
        if kl < self.target / 1.5:
            self.coef /= 2.0
        elif kl > self.target * 1.5:
            self.coef *= 2.0

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self.coef = float(state["coef"])
