"""Logits cut along the vocabulary, against whole ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.ops import comm
from shardwise.ops.logits import Logits, entropies, greedy_tokens, selected_logprobs
from tests.support.pool import RankPool

VOCAB, ROWS, TOKENS = 9, 2, 5


def _case() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(ROWS, TOKENS, VOCAB, generator=g, dtype=torch.float64) * 30
    logits[0, 0] = 1.0  # all equal: greedy takes the first
    targets = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=g)
    mask = torch.rand(ROWS, TOKENS, generator=g) < 0.7
    logits[~mask] = torch.nan  # never read by log-probabilities
    return logits, targets, mask


def _answers(part: Tensor | Logits, leaf: Tensor) -> dict[str, Tensor]:
    _, targets, mask = _case()
    logp = selected_logprobs(part, targets, mask, 0.7)
    weights = torch.arange(1.0, 1 + logp.numel(), dtype=torch.float64).view_as(logp)
    (logp * weights).sum().backward()
    assert leaf.grad is not None
    return {"logp": logp.detach(), "grad": leaf.grad}


def _sharded() -> dict[str, Tensor]:
    world, rank = dist.get_world_size(), dist.get_rank()
    logits = _case()[0]
    each = -(-VOCAB // world)
    start = min(rank * each, VOCAB)
    own = slice(start, min(start + each, VOCAB))  # of 8 ranks, three have no word
    leaf = logits[..., own].clone().requires_grad_()
    with comm.tally() as tally:
        found = _answers(Logits(leaf, start, dist.group.WORLD), leaf)
    clean = logits.nan_to_num(0.5)
    part = Logits(clean[..., own].contiguous(), start, dist.group.WORLD)
    found["entropy"], found["greedy"] = entropies(part, 0.7), greedy_tokens(part)
    found["bytes"] = torch.tensor(sum(tally.bytes.values()))
    return found


def test_equals_whole_logits_and_moves_three_numbers_a_token(ranks: RankPool) -> None:
    logits, _, mask = _case()
    leaf = logits.clone().requires_grad_()
    expected = _answers(leaf, leaf)
    clean = logits.nan_to_num(0.5)
    for world in (2, 4, 8):
        parts = ranks.run(_sharded, world=world)
        for found in parts:
            torch.testing.assert_close(found["logp"], expected["logp"], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found["entropy"], entropies(clean, 0.7), rtol=1e-10, atol=0)
            assert torch.equal(found["greedy"], greedy_tokens(clean))
            assert found["bytes"] == 3 * 8 * mask.sum()
        grad = torch.cat([found["grad"] for found in parts], dim=-1)
        torch.testing.assert_close(grad, expected["grad"], rtol=1e-12, atol=1e-12)
