"""PPO's losses against the papers in plain floats, and over every cut of a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.data.groups import collate_groups
from shardwise.losses.config import PpoLossConfig
from shardwise.losses.kl import kl_estimate
from shardwise.losses.ppo import PolicyLoss, ValueLoss
from shardwise.losses.presets import PPO_PRESETS

F64 = torch.float64
VOCAB = 7
PROMPTS = [[1, 2, 3], [4], [5, 6]]
ANSWERS = [[[1, 2], [3, 4, 5, 6]], [[0], [1, 2, 3]], [[2, 2, 2], [6]]]
PER_TOKEN = ("old_logprobs_BT", "advantages_BT", "values_BT", "returns_BT")


def drawn(name: str, prompt: int, answer: int) -> Tensor:
    """One number a token, the same wherever the token stands."""
    g = torch.Generator().manual_seed(hash_of(name) + 31 * prompt + 7 * answer)
    return torch.randn(len(ANSWERS[prompt][answer]), generator=g, dtype=F64)


def hash_of(name: str) -> int:
    return sum(name.encode())


def outputs(batch: MicroBatch, width: int) -> Tensor:
    """A model's output, a function of the token, its position and its target; NaN where masked."""
    ids, at = batch.input_ids_BT.double(), batch.position_ids_BT.double()
    phase = torch.arange(width, dtype=F64) + 1.0
    table = torch.sin(phase * (ids + 0.37 * at + batch.targets_BT)[..., None])
    return torch.where(batch.loss_mask_BT[..., None], table, torch.nan)


def batch_of(rows: list[int], pad: int) -> MicroBatch:
    per_token = {n: [[drawn(n, p, a) for a in range(2)] for p in rows] for n in PER_TOKEN}
    return collate_groups(
        [PROMPTS[p] for p in rows],
        [ANSWERS[p] for p in rows],
        rows,
        0,
        pad_multiple=pad,
        per_token=per_token,
        dtype=np.float64,
    )


def total(loss: PolicyLoss | ValueLoss, cuts: list[list[int]], pad: int) -> tuple[float, float]:
    """The global loss by the contract, and its gradient along the outputs themselves."""
    width = VOCAB if isinstance(loss, PolicyLoss) else 1
    batches = [batch_of(rows, pad) for rows in cuts]
    counts = {n: sum(float(loss.counts(b)[n]) for b in batches) for n in loss.weights}
    value = slope = 0.0
    for batch in batches:
        leaf = outputs(batch, width).requires_grad_()
        out = loss(leaf, batch)
        part = torch.stack([loss.weights[n] * s / (counts[n] or 1.0) for n, s in out.sums.items()])
        part.sum().backward()
        assert leaf.grad is not None and not leaf.grad[~batch.loss_mask_BT].any()
        value += float(part.detach().sum())
        mask_BT = batch.loss_mask_BT
        slope += float((leaf.grad[mask_BT] * leaf.detach()[mask_BT]).sum())
    return value, slope


def naive(config: PpoLossConfig, kind: str) -> float:
    """Token by token."""
    terms, weights, sequences = [], [], 0
    batch = batch_of([0, 1, 2], 1)
    width = VOCAB if kind == "policy" else 1
    table = outputs(batch, width)
    for b, answers in enumerate(ANSWERS):
        column = len(PROMPTS[b]) - 1
        for a, answer in enumerate(answers):
            sequences += 1
            for t, token in enumerate(answer):
                row = table[b, column]
                per_token = {n: float(drawn(n, b, a)[t]) for n in PER_TOKEN}
                if kind == "policy":
                    terms.append(naive_policy(config, row, token, per_token))
                else:
                    terms.append(naive_value(config, float(row[0]), per_token))
                by_sequence = config.aggregation == "seq_mean_token_mean"
                weights.append(1.0 / len(answer) if by_sequence else 1.0)
                column += 1
    number = sequences if config.aggregation == "seq_mean_token_mean" else len(terms)
    return sum(w * x for w, x in zip(weights, terms, strict=True)) / number


def naive_policy(c: PpoLossConfig, row: Tensor, token: int, per_token: dict[str, float]) -> float:
    values = row.tolist()
    logp = values[token] - math.log(sum(math.exp(v) for v in values))
    ratio, adv = math.exp(logp - per_token["old_logprobs_BT"]), per_token["advantages_BT"]
    if c.objective == "kl_penalty":
        return -ratio * adv + c.penalty_coef * (ratio - math.log(ratio) - 1.0)
    bounded = min(max(ratio, 1 - c.clip_low), 1 + c.clip_high)
    objective = min(ratio * adv, bounded * adv)
    if c.dual_clip is not None and adv < 0:
        objective = max(objective, c.dual_clip * adv)
    return -objective


def naive_value(c: PpoLossConfig, value: float, per_token: dict[str, float]) -> float:
    old, target = per_token["values_BT"], per_token["returns_BT"]
    plain = (value - target) ** 2
    if c.value_clip is None:
        return 0.5 * plain
    near = min(max(value, old - c.value_clip), old + c.value_clip)
    return 0.5 * max(plain, (near - target) ** 2)


CONFIGS = [
    PpoLossConfig(),
    PpoLossConfig(dual_clip=3.0, clip_high=0.28, value_clip=0.5),
    PpoLossConfig(objective="kl_penalty", penalty_coef=0.7, value_clip=None),
    PpoLossConfig(aggregation="seq_mean_token_mean"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_losses_are_the_papers_and_no_cut_changes_them(config: PpoLossConfig, kind: str) -> None:
    loss = PolicyLoss(config) if kind == "policy" else ValueLoss(config)
    value, slope = total(loss, [[0, 1, 2]], 1)
    assert value == pytest.approx(naive(config, kind), rel=1e-10)
    assert math.isfinite(slope) and slope != 0
    for cuts, pad in (([[0], [1], [2]], 16), ([[2, 0], [1]], 5)):
        assert total(loss, cuts, pad) == pytest.approx((value, slope), rel=1e-11)


def test_the_penalty_is_the_kl_of_the_old_policy_and_has_its_gradient() -> None:
    """Summed over all tokens with the old policy's probabilities, value and gradient are exact."""
    old = torch.log_softmax(torch.tensor([0.3, -1.0, 0.5], dtype=F64), 0)
    logits = torch.tensor([0.1, 0.4, -0.2], dtype=F64, requires_grad=True)
    new = torch.log_softmax(logits, 0)
    exact = (old.exp() * (old - new)).sum()
    estimate = (old.exp() * kl_estimate("k3", old, new)).sum()
    torch.testing.assert_close(estimate, exact)
    [a] = torch.autograd.grad(exact, logits, retain_graph=True)
    [b] = torch.autograd.grad(estimate, logits)
    torch.testing.assert_close(a, b)


def test_presets_say_what_is_not_given() -> None:
    for name, preset in PPO_PRESETS.items():
        config = PpoLossConfig.model_validate({"preset": name})
        assert all(getattr(config, k) == v for k, v in preset.settings.items())
        assert PpoLossConfig.model_validate({"preset": name, "kl_coef": 0.5}).kl_coef == 0.5
    with pytest.raises(ValueError, match="kl_target adapts"):
        PpoLossConfig(kl_coef=0.0, kl_target=1.0)
