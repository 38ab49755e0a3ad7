"""Logits cut along the vocabulary, against whole ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.ops import comm
from shardwise.ops.logits import (
    Logits,
    entropies,
    greedy_tokens,
    likeliest_words,
    selected_logprobs,
    selected_values,
    selected_words,
)
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


def _kept() -> Tensor:
    """Words that were left of each token's: its target and some more, -1 behind."""
    _, targets, _ = _case()
    extra = torch.randint(-1, VOCAB, (ROWS, TOKENS, 3), generator=torch.Generator().manual_seed(3))
    return torch.cat((targets[..., None], extra), dim=-1)


def _answers(part: Tensor | Logits, leaf: Tensor, kept: Tensor | None = None) -> dict[str, Tensor]:
    _, targets, mask = _case()
    logp = selected_logprobs(part, targets, mask, 0.7, kept_BTK=kept)
    weights = torch.arange(1.0, 1 + logp.numel(), dtype=torch.float64).view_as(logp)
    (logp * weights).sum().backward()
    assert leaf.grad is not None
    return {"logp": logp.detach(), "grad": leaf.grad}


def _sharded(cut: bool = False) -> dict[str, Tensor]:
    world, rank = dist.get_world_size(), dist.get_rank()
    logits = _case()[0]
    each = -(-VOCAB // world)
    start = min(rank * each, VOCAB)
    own = slice(start, min(start + each, VOCAB))  # of 8 ranks, three have no word
    leaf = logits[..., own].clone().requires_grad_()
    with comm.tally() as tally:
        kept = _kept() if cut else None
        found = _answers(Logits(leaf, start, dist.group.WORLD), leaf, kept)
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


def test_of_words_that_were_left_the_others_do_not_count(ranks: RankPool) -> None:
    logits, targets, mask = _case()
    leaf = logits.clone().requires_grad_()
    whole = _answers(leaf, leaf, _kept())
    for b, t in mask.nonzero().tolist():
        left = _kept()[b, t]
        words = left[left >= 0].unique()
        logp = (logits[b, t, words] / 0.7).log_softmax(0)
        torch.testing.assert_close(whole["logp"][b, t], logp[words == targets[b, t]][0])
        others = [w for w in range(VOCAB) if w not in words.tolist()]
        assert not whole["grad"][b, t, others].any()
    for world in (2, 8):
        parts = ranks.run(_sharded, True, world=world)
        for found in parts:
            torch.testing.assert_close(found["logp"], whole["logp"], rtol=1e-12, atol=1e-12)
        grad = torch.cat([found["grad"] for found in parts], dim=-1)
        torch.testing.assert_close(grad, whole["grad"], rtol=1e-12, atol=1e-12)


def _readings(selects: bool) -> list[Tensor]:
    """All that is read of this rank's words, and its gradient, [B, T, ...]."""
    logits, targets, mask = _case()
    valid, group = mask.flatten().nonzero().flatten(), None
    own = slice(0, VOCAB)
    if dist.is_initialized():
        each, group = -(-VOCAB // dist.get_world_size()), dist.group.WORLD
        start = min(dist.get_rank() * each, VOCAB)
        own = slice(start, min(start + each, VOCAB))
    leaf = logits[..., own].clone().requires_grad_()
    rows = leaf.flatten(0, 1)[valid] if selects else leaf
    size = {"num_rows": ROWS, "num_tokens": TOKENS} if selects else {}
    part = Logits(rows, own.start, group, valid_N=valid, **size)
    words = likeliest_words(part, mask, 3, valid)
    found = [
        selected_logprobs(part, targets, mask, 0.7, valid),
        selected_logprobs(part, targets, mask, 0.7, valid, _kept()),
        selected_words(part, words, mask, 0.7, valid),
    ]
    sum((x * torch.arange(x.numel()).view_as(x)).sum() for x in found).backward()
    assert leaf.grad is not None
    scalars = selected_values(Logits(rows[..., :1], 0, group, valid_N=valid, **size), mask)
    dense = [entropies(part, 0.7), greedy_tokens(part)]
    if selects:
        assert not any(x[~mask].any() for x in dense)
        with pytest.raises(ValueError, match=r"valid_N=batch.valid\(\)"):
            selected_logprobs(part, targets, mask)
    masked = [torch.where(mask, x, 0) for x in dense]
    return [x.detach() for x in (*found, words, scalars, *masked, leaf.grad)]


def test_rows_of_valid_tokens_alone_say_the_same(ranks: RankPool) -> None:
    pairs = [(_readings(True), _readings(False))]
    for world in (2, 8):
        both = (ranks.run(_readings, selects, world=world) for selects in (True, False))
        pairs += zip(*both, strict=True)
    for selected, whole in pairs:
        for ours, theirs in zip(selected, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def _scalar_case() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, TOKENS, 6, generator=g, dtype=torch.float64)
    weight = torch.randn(1, 6, generator=g, dtype=torch.float64)
    return x, weight, torch.rand(ROWS, TOKENS, generator=g) < 0.7


def _scalar(part: bool) -> tuple[Tensor, Tensor]:
    """Values and the gradient of the inputs; with ``part``, each rank multiplies its features."""
    x, weight, mask = _scalar_case()
    own = slice(0, 6)
    if part:
        each = 6 // dist.get_world_size()
        own = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    leaf = x.clone().requires_grad_()
    out = leaf[..., own] @ weight[:, own].T
    values = selected_values(Logits(out, 0, dist.group.WORLD) if part else out, mask)
    (values * torch.arange(values.numel()).view_as(values)).sum().backward()
    assert leaf.grad is not None
    return values.detach(), leaf.grad


def test_a_scalar_heads_parts_add_up_and_each_keeps_its_gradient(ranks: RankPool) -> None:
    values, grad = _scalar(False)
    for world in (2, 3):
        parts = ranks.run(_scalar, True, world=world)
        for found, _ in parts:
            torch.testing.assert_close(found, values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sum(g for _, g in parts), grad)
    assert not values[~_scalar_case()[2]].any()
