"""Rewards, GAE and controllers, against the papers in plain floats; padding is never read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shardwise.losses.advantages import whiten
from shardwise.losses.gae import (
    KLController,
    PenaltyController,
    explained_variance,
    gae,
    token_rewards,
)

F64 = torch.float64
LENGTHS = (4, 1, 6)


def case(width: int, fill: float = 0.0) -> dict[str, Tensor]:
    """Completions of LENGTHS in rows of ``width``; ``fill`` stands behind them."""
    found = {}
    for seed, name in enumerate(("rewards", "values", "logp", "ref")):
        g = torch.Generator().manual_seed(seed)
        rows = [torch.randn(n, generator=g, dtype=F64) for n in LENGTHS]
        out = torch.full((len(LENGTHS), width), fill, dtype=F64)
        for row, values in zip(out, rows, strict=True):
            row[: len(values)] = values
        found[name] = out
    index = torch.arange(width)
    found["mask"] = index[None] < torch.tensor(LENGTHS)[:, None]
    return found


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma lam)^l delta_{t + l}: equation 16, not its recursion."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** (i - t) * deltas[i] for i in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_papers_and_stops_at_the_end_of_a_completion(gamma: float, lam: float) -> None:
    for width, fill in ((6, 0.0), (9, 7.0), (16, math.nan)):
        c = case(width, fill)
        advantages, returns = gae(c["rewards"], c["values"], c["mask"], gamma, lam)
        for b, length in enumerate(LENGTHS):
            rewards, values = c["rewards"][b, :length], c["values"][b, :length]
            expected = torch.tensor(naive_gae(rewards.tolist(), values.tolist(), gamma, lam))
            torch.testing.assert_close(advantages[b, :length], expected.double())
            torch.testing.assert_close(returns[b, :length], expected.double() + values)
            assert not advantages[b, length:].any() and not returns[b, length:].any()


def test_tokens_of_a_tool_carry_value_and_advantage_through() -> None:
    """Leaving them out of the sequence gives the same."""
    g = torch.Generator().manual_seed(9)
    rewards, values = (torch.randn(1, 7, generator=g, dtype=F64) for _ in range(2))
    mask = torch.tensor([[True, True, False, False, True, True, True]])
    advantages, _ = gae(rewards, values, mask, 0.9, 0.8)
    own = mask[0]
    alone, _ = gae(rewards[:, own], values[:, own], mask[:, own], 0.9, 0.8)
    torch.testing.assert_close(advantages[:, own], alone)
    assert not advantages[:, ~own].any()


@pytest.mark.parametrize("width,fill", [(6, 0.0), (11, math.nan)])
def test_the_score_lands_on_the_last_token_and_the_kl_on_each(width: int, fill: float) -> None:
    c = case(width, fill)
    score = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    rewards = token_rewards(score, c["logp"], c["ref"], c["mask"], 0.3)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            # Being likelier than the reference costs.
            expected = -0.3 * float(c["logp"][b, t] - c["ref"][b, t])
            expected += float(score[b]) if t == length - 1 else 0.0
            assert float(rewards[b, t]) == pytest.approx(expected)
        assert not rewards[b, length:].any()
    bare = token_rewards(score, c["logp"], None, c["mask"])
    assert bare.sum(dim=1).tolist() == score.tolist()


def test_a_completion_without_valid_tokens_gets_nothing() -> None:
    c = case(6)
    c["mask"][1] = False
    rewards = token_rewards(torch.ones(3, dtype=F64), c["logp"], None, c["mask"])
    assert rewards.sum(dim=1).tolist() == [1.0, 0.0, 1.0]


def test_whitening_is_over_everything_and_rewards_keep_their_mean() -> None:
    c = case(9, math.nan)
    flat = torch.cat([c["rewards"][b, :n] for b, n in enumerate(LENGTHS)])
    expected = (flat - flat.mean()) / torch.sqrt(flat.var(correction=0) + 1e-8)
    torch.testing.assert_close(whiten(c["rewards"], c["mask"])[c["mask"]], expected)
    kept = whiten(c["rewards"], c["mask"], shift_mean=False)
    torch.testing.assert_close(kept[c["mask"]], expected + flat.mean())


def test_explained_variance() -> None:
    c = case(6)
    assert explained_variance(c["rewards"], c["rewards"], c["mask"]) == 1.0
    assert explained_variance(torch.zeros_like(c["rewards"]), c["rewards"], c["mask"]) == 0.0
    assert explained_variance(c["values"], torch.ones_like(c["values"]), c["mask"]) == 0.0
    noisy = explained_variance(2.0 * c["rewards"], c["rewards"], c["mask"])
    assert noisy == pytest.approx(0.0)


def test_adaptive_kl_coefficient_follows_ziegler() -> None:
    it = KLController(0.2, target=6.0, gain=0.1)
    it.update(6.6)  # error 0.1
    assert it.coef == pytest.approx(0.2 * 1.01)
    it.update(60.0)  # clipped at 0.2
    assert it.coef == pytest.approx(0.2 * 1.01 * 1.02)
    it.update(-5.0)
    assert it.coef == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
    other = KLController(1.0, target=6.0)
    other.load_state_dict(it.state_dict())
    assert other.coef == it.coef
    fixed = KLController(0.2)
    fixed.update(100.0)
    assert fixed.coef == 0.2


def test_penalty_coefficient_halves_and_doubles() -> None:
    it = PenaltyController(1.0, target=0.03)
    for kl, expected in ((0.019, 0.5), (0.021, 0.5), (0.044, 0.5), (0.046, 1.0)):
        it.update(kl)
        assert it.coef == expected
