"""Batches of sequences laid out in different ways, for the invariance tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.contract import Loss

VOCAB = 7
NAN = float("nan")


@dataclasses.dataclass
class Sample:
    """One sequence in fp64: prompt and response positions with all that a loss may ask for."""

    logits_TV: Tensor
    targets_T: Tensor
    mask_T: Tensor
    old_T: Tensor
    ref_T: Tensor
    rollout_T: Tensor
    advantage: float

    @property
    def length(self) -> int:
        return len(self.targets_T)

    def logprobs(self, temperature: float = 1.0) -> Tensor:
        """Reference log-probabilities, straight from the definition."""
        table_TV = torch.log_softmax(self.logits_TV / temperature, dim=-1)
        return table_TV[torch.arange(self.length), self.targets_T]


def make_samples(seed: int, lengths: Sequence[tuple[int, int]], spread: float) -> list[Sample]:
    """``lengths`` are (prompt, response) tokens; ``spread`` is how far old, ref, rollout differ."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    samples = []
    for prompt, response in lengths:
        length = prompt + response
        sample = Sample(
            logits_TV=normal(length, VOCAB),
            targets_T=torch.randint(VOCAB, (length,), generator=g),
            mask_T=torch.arange(length) >= prompt,
            old_T=normal(length) * spread,
            ref_T=normal(length) * spread,
            rollout_T=normal(length) * spread,
            advantage=float(normal(1)),
        )
        logp_T = sample.logprobs()
        for name in ("old_T", "ref_T", "rollout_T"):
            setattr(sample, name, getattr(sample, name) + logp_T)
        samples.append(sample)
    return samples


@dataclasses.dataclass
class Laid:
    """A micro-batch, its logits (a leaf), and where each sample stands: (row, first column)."""

    batch: MicroBatch
    logits_BTV: Tensor
    places: list[tuple[Sample, int, int]]


def lay_out(rows: Sequence[Sequence[Sample]], width: int, packed: bool) -> Laid:
    """Rows of one sample each, or of several with segment ids, padded to ``width``.

    Whatever is not a response position holds NaN: it must not matter.
    """
    size = (len(rows), width)
    logits_BTV = torch.full((*size, VOCAB), NAN, dtype=torch.float64)
    targets_BT = torch.zeros(size, dtype=torch.int64)
    mask_BT = torch.zeros(size, dtype=torch.bool)
    segments_BT = torch.full(size, -1)
    names = ("old_logprobs_BT", "ref_logprobs_BT", "rollout_logprobs_BT", "advantages_BT")
    extras = {n: torch.full(size, NAN, dtype=torch.float64) for n in names}
    places = []
    for b, row in enumerate(rows):
        start = 0
        for i, s in enumerate(row):
            span = slice(start, start + s.length)
            mask_BT[b, span] = s.mask_T
            targets_BT[b, span] = s.targets_T
            segments_BT[b, span] = i
            valid_T = s.mask_T
            logits_BTV[b, span][valid_T] = s.logits_TV[valid_T]
            for name, value_T in zip(names[:3], (s.old_T, s.ref_T, s.rollout_T)):
                extras[name][b, span][valid_T] = value_T[valid_T]
            extras["advantages_BT"][b, span][valid_T] = s.advantage
            places.append((s, b, start))
            start += s.length
    batch = MicroBatch(
        input_ids_BT=targets_BT,
        position_ids_BT=torch.zeros(size, dtype=torch.int64),
        targets_BT=targets_BT,
        loss_mask_BT=mask_BT,
        sample_ids_B=torch.arange(len(rows)),
        segment_ids_BT=segments_BT if packed else None,
        extras=extras,
    )
    return Laid(batch, logits_BTV.requires_grad_(), places)


def run(loss: Loss, laid: Sequence[Laid]) -> tuple[float, dict[int, Tensor]]:
    """What an engine does: counts first, one division, a sum of gradients.

    Returns the total and, per sample (by id), the gradient of its logits [T, V].
    """
    totals: dict[str, Tensor] = {}
    for part in laid:
        for name, count in loss.counts(part.batch).items():
            totals[name] = totals.get(name, torch.zeros(())) + count
    value = 0.0
    for part in laid:
        sums = loss(part.logits_BTV, part.batch).sums
        objective = torch.zeros((), dtype=torch.float64)
        for name, term in sums.items():
            divisor = totals[name] if totals[name] > 0 else 1.0
            objective = objective + loss.weights[name] * term / divisor
        objective.backward()  # type: ignore[no-untyped-call]
        value += objective.item()
    grads = {}
    for part in laid:
        grad_BTV = part.logits_BTV.grad
        assert grad_BTV is not None
        outside = grad_BTV[~part.batch.loss_mask_BT]
        assert torch.equal(outside, torch.zeros_like(outside))
        for s, b, start in part.places:
            grads[id(s)] = grad_BTV[b, start : start + s.length]
    return value, grads
