"""Log-probabilities of some words against plain softmax, whole and cut over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.ops import words
from shardwise.ops.cross_entropy import Shard
from shardwise.ops.words import top_words, word_logprobs
from tests.support.pool import RankPool

F64 = torch.float64


def plain(logits_NV: Tensor, ids_NK: Tensor, temperature: float) -> Tensor:
    logp_NV = torch.log_softmax(logits_NV.double() / temperature, dim=-1)
    others_NV = logp_NV.scatter(1, ids_NK, -torch.inf)
    return torch.cat((logp_NV.gather(1, ids_NK), others_NV.logsumexp(1, keepdim=True)), dim=1)


def sample(num: int, width: int, k: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(num + width)
    logits = scale * torch.randn(num, width, generator=g, dtype=F64)
    ids = torch.stack([torch.randperm(width, generator=g)[:k] for _ in range(num)])
    return logits, ids, torch.randn(num, k + 1, generator=g, dtype=F64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_values_and_gradients(
    temperature: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardwise.ops.cross_entropy._CPU_CHUNK_ELEMENTS", 40)  # chunks of 3 rows
    logits, ids, weight = sample(7, 13, 4, scale)
    a, b = (logits.clone().requires_grad_() for _ in range(2))
    found, expected = word_logprobs(a, ids, temperature), plain(b, ids, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_all_words_leave_no_others() -> None:
    logits, ids, weight = sample(3, 6, 6)
    a, b = (logits.clone().requires_grad_() for _ in range(2))
    found = word_logprobs(a, ids)
    assert (found[:, -1] == -torch.inf).all()
    (found[:, :-1] * weight[:, :-1]).sum().backward()
    (torch.log_softmax(b, -1).gather(1, ids) * weight[:, :-1]).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_small_dtypes_are_read_wide() -> None:
    logits, ids, _ = sample(5, 9, 3)
    found = word_logprobs(logits.bfloat16(), ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), plain(logits.bfloat16(), ids, 1.0), rtol=1e-5, atol=1e-5
    )


def cut(width: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """On every rank: the top words, the log-probabilities and the whole gradient."""
    logits, ids, weight = sample(5, width, k)
    group = dist.group.WORLD
    assert group is not None
    rank, world = dist.get_rank(), dist.get_world_size()
    each = -(-width // world)
    begin, end = min(rank * each, width), min((rank + 1) * each, width)
    own = logits[:, begin:end].clone().requires_grad_()
    shard = Shard(begin, group)
    found = word_logprobs(own, ids, 0.8, shard)
    (found * weight).sum().backward()
    assert own.grad is not None
    whole = torch.zeros_like(logits)
    whole[:, begin:end] = own.grad
    dist.all_reduce(whole)
    return words.top_words(own.detach(), k, shard), found.detach(), whole


@pytest.mark.parametrize(("width", "world"), [(11, 2), (5, 4)])
def test_a_cut_vocabulary_changes_nothing(ranks: RankPool, width: int, world: int) -> None:
    """A rank of four has no word of five, and another has fewer than are asked for."""
    logits, ids, weight = sample(5, width, 3)
    logits.requires_grad_()
    expected = plain(logits, ids, 0.8)
    (expected * weight).sum().backward()
    for top, found, grad in ranks.run(cut, width, 3, world=world):
        assert top.equal(logits.detach().topk(3, dim=1).indices)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, logits.grad, rtol=1e-11, atol=1e-12)


def test_top_words_come_best_first() -> None:
    logits = torch.tensor([[0.1, 3.0, -1.0, 2.0]])
    assert top_words(logits, 3).tolist() == [[1, 3, 0]]
