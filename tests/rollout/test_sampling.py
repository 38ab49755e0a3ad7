"""Sampling: the distribution, its filters, and draws that depend on names alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.rollout.config import Sampling
from shardwise.rollout.sampling import choose, filtered, row_keys, uniform_at


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_even_uniforms_give_each_token_its_share(temperature: float) -> None:
    """Inverting the distribution at N even points hits a token N p times, give or take one."""
    num = 5000
    row = logits(1, 17)
    u = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    token, logp, kept, _ = choose(row.expand(num, -1), Sampling(temperature=temperature), u)
    expected = (row[0].double() / temperature).softmax(-1)
    assert ((token.bincount(minlength=17) - num * expected).abs() <= 1).all()
    torch.testing.assert_close(logp.double(), expected.log()[token], atol=1e-5, rtol=0)
    assert torch.equal(logp, kept)


@given(st.integers(0, 10**6), st.integers(0, 12), st.floats(0.05, 1.0))
@settings(max_examples=60)
def test_filters_keep_the_most_probable(seed: int, top_k: int, top_p: float) -> None:
    z = logits(3, 11, seed)
    kept = filtered(z, top_k, top_p)
    for row, result in zip(z.tolist(), kept.tolist()):
        order = sorted(range(11), key=lambda i: (-row[i], i))[: top_k or None]
        mass = [math.exp(row[i]) for i in order]
        total, reached, expected = sum(mass), 0.0, set()
        for i, m in zip(order, mass):
            if reached / total < top_p - 1e-6 or not expected:
                expected.add(i)
            reached += m
        found = {i for i in range(11) if result[i] > -math.inf}
        # A nucleus whose mass falls on top_p itself may be decided by rounding.
        assert (
            found == expected or abs(sum(math.exp(row[i]) for i in expected) / total - top_p) < 1e-5
        )
        assert all(result[i] == row[i] for i in found)


def test_behavior_logprobs_are_renormalised_and_the_others_are_not() -> None:
    z = logits(200, 30)
    u = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    token, logp, kept, _ = choose(z, Sampling(temperature=0.7, top_k=5, top_p=0.9), u)
    full = (z / 0.7).log_softmax(-1)
    part = filtered(z / 0.7, 5, 0.9).log_softmax(-1)
    torch.testing.assert_close(logp, full.gather(1, token[:, None])[:, 0])
    torch.testing.assert_close(kept, part.gather(1, token[:, None])[:, 0])
    assert (kept > logp).all() and kept.isfinite().all()


def test_greedy_ignores_filters_and_takes_the_first_of_equals() -> None:
    z = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    settings = Sampling(greedy=True, top_k=1, top_p=0.1, temperature=2.0)
    token, logp, kept, _ = choose(z, settings, torch.tensor([0.99], dtype=torch.float64))
    assert token.tolist() == [1] and torch.equal(logp, kept)
    torch.testing.assert_close(logp, (z / 2).log_softmax(-1)[:, 1])


@given(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
def test_impossible_tokens_are_never_drawn(u: float) -> None:
    z = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0, -math.inf]])
    token, *_ = choose(z, Sampling(), torch.tensor([u], dtype=torch.float64))
    assert token.item() in (1, 3)


def test_draws_depend_on_names_alone() -> None:
    prompts, samples = torch.tensor([3, 3, 4, 9]), torch.tensor([0, 1, 0, 5])
    index = torch.tensor([0, 7, 7, 2])
    whole = uniform_at(row_keys(42, prompts, samples), index)
    for i in range(4):
        alone = uniform_at(row_keys(42, prompts[i : i + 1], samples[i : i + 1]), index[i : i + 1])
        assert alone.item() == whole[i].item()
    assert len(set(whole.tolist())) == 4
    assert not torch.equal(whole, uniform_at(row_keys(43, prompts, samples), index))
