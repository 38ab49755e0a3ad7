"""Advantages from rewards, in float64: no model, no gradient, computed once per rollout.

Rewards of a prompt's completions form a row; NaN marks a member whose reward is *unscorable* (the
verifier crashed or timed out). It is left out of its group's statistics, gets advantage 0, and is
False in ``scorable``, so that the caller can take its tokens out of the loss mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardwise.losses.config import AdvantageKind

# Shape suffixes: G groups (prompts), N members of a group, B rows, T tokens.


@dataclasses.dataclass(frozen=True)
class GroupAdvantages:
    """Advantages with what they rest on."""

    advantages_GN: Tensor  # float64, 0 for unscorable members and degenerate groups
    scorable_GN: Tensor  # bool
    degenerate_G: Tensor  # bool: at least one scorable member, all of them exactly equal

    @property
    def num_degenerate(self) -> int:
        """Groups that teach nothing (DAPO drops and resamples them)."""
        return int(self.degenerate_G.sum())

    @property
    def num_unscorable(self) -> int:
        """Members without a reward."""
        return int((~self.scorable_GN).sum())


def rewards_tensor(groups: Sequence[Sequence[float | None]]) -> Tensor:
    """Rewards as float64 [G, N]; None and the missing end of a shorter group become NaN."""
    width = max((len(g) for g in groups), default=0)
    nan = float("nan")
    rows = [[nan if r is None else float(r) for r in g] + [nan] * (width - len(g)) for g in groups]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(groups), width)


def group_advantages(kind: AdvantageKind, rewards_GN: Tensor, eps: float = 1e-6) -> GroupAdvantages:
    """Advantages of each member against its group.

    - group_std: (R - mean) / (std + eps), sample std (GRPO, Shao et al. 2024, section 4.1.2).
    - group: R - mean (Dr. GRPO, Liu et al. 2025, section 3.2).
    - rloo: R - mean of the others (Ahmadian et al. 2024, "Back to Basics", RLOO).
    - reinforce_pp: (R - mean) / std over *all* groups (Hu 2025, "REINFORCE++"; here
      sequences weigh alike, `returns_to_go` and `whiten` do the same over tokens).

    A group whose scorable rewards are all exactly equal is degenerate: under the first three its
    advantages are exactly 0, which rounding in a mean or a small std would not give.
    """
    rewards = rewards_GN.double()
    scorable = torch.isfinite(rewards)
    rewards = torch.where(scorable, rewards, 0.0)
    number = scorable.sum(dim=1, keepdim=True).double()
    top = torch.where(scorable, rewards, -torch.inf).amax(dim=1)
    low = torch.where(scorable, rewards, torch.inf).amin(dim=1)
    degenerate = top == low
    if kind == "reinforce_pp":
        return GroupAdvantages(whiten(rewards, scorable), scorable, degenerate)
    centred = rewards - rewards.sum(dim=1, keepdim=True) / number.clamp(min=1.0)
    centred = torch.where(scorable & ~degenerate[:, None], centred, 0.0)
    if kind == "group_std":
        variance = centred.square().sum(dim=1, keepdim=True) / (number - 1.0).clamp(min=1.0)
        centred = centred / (variance.sqrt() + eps)
    elif kind == "rloo":
        # R - mean of the others = (R - mean) n / (n - 1)
        centred = centred * number / (number - 1.0).clamp(min=1.0)
    elif kind != "group":
        raise ValueError(f"unknown advantage {kind!r}")
    return GroupAdvantages(centred, scorable, degenerate)


Total = Callable[[Tensor], "Tensor | float"]  # the sum of numbers over the whole batch


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, total: Total = torch.sum) -> Tensor:
    """(x - mean) rsqrt(var + 1e-8) over the True entries of ``mask``; 0 elsewhere.

    Biased variance, as in the PPO of Huang et al. 2024, "The N+ Implementation Details of RLHF".
    Without ``shift_mean`` the mean is kept: the form for rewards. Hand in the whole global batch,
    or a part and a ``total`` that sums over the others, too.
    """
    number = max(float(total(mask.double())), 1.0)
    mean = total(torch.where(mask, x, 0.0)) / number
    centred = torch.where(mask, x - mean, 0.0)
    spread = torch.as_tensor(total(centred.square()) / number, dtype=x.dtype)
    scaled = centred * torch.rsqrt(spread + 1e-8)
    return scaled if shift_mean else torch.where(mask, scaled + mean, 0.0)
