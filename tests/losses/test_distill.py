"""Divergences against plain softmax over the whole vocabulary; no cut of a batch changes one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch, join
from shardwise.losses.distill import LOGPROBS, WORDS, DistillLoss, TeacherWords, divergence, kl
from shardwise.losses.distill_config import DivergenceConfig

F64 = torch.float64
V = 11


def made(rows: int, config: DivergenceConfig) -> tuple[MicroBatch, Tensor, Tensor]:
    """A batch with the teacher's words in it; the logits of teacher and student."""
    g = torch.Generator().manual_seed(3)
    T = 5
    mask_BT = torch.rand(rows, T, generator=g) < 0.7
    batch = MicroBatch(
        torch.zeros(rows, T, dtype=torch.int64),
        torch.arange(T).expand(rows, T),
        torch.randint(0, V, (rows, T), generator=g),
        mask_BT,
        torch.arange(rows),
    )
    teacher, student = (2 * torch.randn(rows, T, V, generator=g, dtype=F64) for _ in range(2))
    words = TeacherWords(config, V)
    said = words(torch.where(mask_BT[..., None], teacher, torch.nan), batch)
    assert said.shape[-1] == words.num_words + words.num_buckets
    assert words.compared(said).shape[-1] == words.num_buckets
    extras = {WORDS: said[..., : words.num_words].long(), LOGPROBS: words.compared(said)}
    return dataclasses.replace(batch, extras=extras), teacher, student


def plain(p_NV: Tensor, q_NV: Tensor, config: DivergenceConfig) -> Tensor:
    """The definition, on probabilities."""
    p, q = (torch.softmax(x / config.temperature, -1) for x in (p_NV, q_NV))
    if config.top_k is not None:
        ids = p.topk(config.top_k).indices
        p, q = (
            torch.cat((x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)), 1)
            for x in (p, q)
        )

    def of(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if config.kind != "jsd":
        return of(p, q) if config.kind == "forward_kl" else of(q, p)
    m = config.beta * p + (1 - config.beta) * q
    return config.beta * of(p, m) + (1 - config.beta) * of(q, m)


KINDS = [{"kind": "forward_kl"}, {"kind": "reverse_kl"}, {"kind": "jsd", "beta": 0.3}]


@pytest.mark.parametrize("top_k", [None, 3, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_papers(kind: dict[str, Any], top_k: int | None) -> None:
    config = DivergenceConfig.model_validate({**kind, "top_k": top_k, "temperature": 1.7})
    batch, teacher, student = made(4, config)
    mask = batch.loss_mask_BT
    a, b = (student.clone().requires_grad_() for _ in range(2))
    out = DistillLoss(config)(torch.where(mask[..., None], a, torch.nan), batch)
    expected = plain(teacher[mask], b[mask], config)
    torch.testing.assert_close(out.sums["divergence"], expected.sum(), rtol=1e-11, atol=1e-12)
    out.sums["divergence"].backward()
    expected.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    per_token = DistillLoss(config).per_token(torch.where(mask[..., None], student, 0.0), batch)
    torch.testing.assert_close(per_token[mask], expected.detach(), rtol=1e-10, atol=1e-12)
    assert not per_token[~mask].any()


def test_a_generalised_divergence_goes_over_into_both_directions() -> None:
    """Agarwal et al. 2023: JSD / beta tends to the forward KL, and / (1 - beta) to the reverse."""
    g = torch.Generator().manual_seed(1)
    p, q = (torch.randn(6, 5, generator=g, dtype=F64).log_softmax(-1) for _ in range(2))
    small = DivergenceConfig(kind="jsd", beta=1e-6)
    large = DivergenceConfig(kind="jsd", beta=1 - 1e-6)
    torch.testing.assert_close(divergence(p, q, small) / 1e-6, kl(p, q), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(divergence(p, q, large) / 1e-6, kl(q, p), rtol=1e-4, atol=1e-5)
    assert (divergence(p, p, DivergenceConfig(kind="jsd")) < 1e-15).all()


def test_buckets_never_raise_a_divergence() -> None:
    wholes = DivergenceConfig(top_k=None)
    whole, teacher, student = made(6, wholes)
    mask = whole.loss_mask_BT
    found = []
    for k in (1, 2, 5, 8):
        config = DivergenceConfig(top_k=k)
        found.append(float(DistillLoss(config)(student, made(6, config)[0]).sums["divergence"]))
    found.append(float(DistillLoss(wholes)(student, whole).sums["divergence"]))
    assert found == sorted(found)
    assert found[-1] == pytest.approx(float(plain(teacher[mask], student[mask], wholes).sum()))


def test_no_cut_of_the_batch_changes_sums() -> None:
    config = DivergenceConfig(kind="jsd", top_k=4)
    batch, _, student = made(5, config)
    loss = DistillLoss(config)
    whole = loss(student, batch)
    parts = [(student[i : i + 1], row) for i, row in enumerate(batch.split(1))]
    sums = sum(float(loss(x, row).sums["divergence"]) for x, row in parts)
    assert sums == pytest.approx(float(whole.sums["divergence"]), rel=1e-12)
    counts = sum(float(loss.counts(row)["divergence"]) for _, row in parts)
    assert counts == float(loss.counts(batch)["divergence"]) == float(batch.loss_mask_BT.sum())
    again = join([row for _, row in parts])
    assert again.extras[WORDS].equal(batch.extras[WORDS])
