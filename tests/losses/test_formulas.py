"""Each formula against the paper, written naively, one sequence and one token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.losses.aggregate import first_valid, fold, sequence_sum
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.config import PolicyLossConfig
from shardwise.losses.grpo import GRPOLoss
from shardwise.losses.kl import kl_estimate
from shardwise.losses.policy import clipped_surrogate, truncated_importance
from tests.losses.support import Sample, lay_out, make_samples, run

LENGTHS = [(2, 4), (1, 6), (0, 3), (3, 1)]


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def naive_surrogate(c: PolicyLossConfig, ratio: float, logp: float, adv: float) -> float:
    bounded = clip(ratio, 1 - c.clip_low, 1 + c.clip_high)
    if c.ratio == "cispo":
        return -bounded * adv * logp
    objective = min(ratio * adv, bounded * adv)
    if c.dual_clip is not None and adv < 0:
        objective = max(objective, c.dual_clip * adv)
    return -objective


def naive_kl(kind: str, logp: float, ref: float) -> float:
    d = ref - logp
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kind]


def naive_loss(c: PolicyLossConfig, samples: list[Sample], temperature: float) -> float:
    """The objective of the papers: sums of floats over sequences and tokens."""
    policy, kl = [], []
    for s in samples:
        where = [t for t in range(s.length) if s.mask_T[t]]
        logp, old = s.logprobs(temperature).tolist(), s.old_T.tolist()
        rollout, ref = s.rollout_T.tolist(), s.ref_T.tolist()
        mean_gap = sum(logp[t] - old[t] for t in where) / len(where)
        total_shift = sum(old[t] - rollout[t] for t in where)
        terms, divergences = [], []
        for t in where:
            gap = mean_gap if c.ratio == "sequence" else logp[t] - old[t]
            term = naive_surrogate(c, math.exp(gap), logp[t], s.advantage)
            if c.importance_cap is not None:
                shift = total_shift if c.importance_level == "sequence" else old[t] - rollout[t]
                term *= min(math.exp(shift), c.importance_cap)
            terms.append(term)
            divergences.append(0.0 if c.kl == "none" else naive_kl(c.kl, logp[t], ref[t]))
        policy.append(terms)
        kl.append(divergences)
    return naive_mean(c, policy) + c.kl_coef * naive_mean(c, kl)


def naive_mean(c: PolicyLossConfig, values: list[list[float]]) -> float:
    flat = [x for row in values for x in row]
    sums = [sum(row) for row in values]
    return {
        "token_mean": lambda: sum(flat) / len(flat),
        "token_sum": lambda: sum(flat),
        "seq_mean_token_mean": lambda: sum(a / len(r) for a, r in zip(sums, values)) / len(sums),
        "seq_mean_token_sum": lambda: sum(sums) / len(sums),
        "constant": lambda: sum(sums) / (c.length_constant or 0) / len(sums),
    }[c.aggregation]()


CONFIGS: list[dict[str, Any]] = [
    {"preset": "grpo_deepseekmath"},
    {"preset": "dapo_paper"},
    {"preset": "dr_grpo", "length_constant": 9},
    {"preset": "gspo"},
    {"preset": "trl_default"},
    {"preset": "verl_default"},
    {"ratio": "cispo", "clip_low": 1.0, "clip_high": 0.3},
    {"kl": "k1", "kl_coef": 0.3},
    {"kl": "k2", "kl_coef": 0.3, "aggregation": "token_sum"},
    {"kl": "k3", "kl_coef": 0.3, "aggregation": "seq_mean_token_sum"},
    {"importance_cap": 1.1},
    {"importance_cap": 2.0, "importance_level": "sequence"},
]


@pytest.mark.parametrize("spread", [0.05, 1.5])
@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_grpo_loss_equals_the_papers(settings: dict[str, Any], spread: float) -> None:
    config = PolicyLossConfig(**settings)
    samples = make_samples(11, LENGTHS, spread)
    for packed, rows in ((False, [[s] for s in samples]), (True, [samples[:3], samples[3:]])):
        value, _ = run(GRPOLoss(config, temperature=1.3), [lay_out(rows, 18, packed)])
        assert value == pytest.approx(naive_loss(config, samples, 1.3), rel=1e-12)


@pytest.mark.parametrize("settings", [c for c in CONFIGS if c.get("ratio") != "cispo"], ids=str)
def test_gradient_by_finite_differences(settings: dict[str, Any]) -> None:
    """fp64 gradcheck through the logits; CISPO, whose weight is detached, below."""
    loss = GRPOLoss(PolicyLossConfig(**settings), temperature=1.3)
    laid = lay_out([[s] for s in make_samples(4, LENGTHS[:2], 0.3)], 7, packed=False)
    valid_BT = laid.batch.loss_mask_BT
    start_NV = laid.logits_BTV.detach()[valid_BT].requires_grad_()

    def total(logits_NV: Tensor) -> Tensor:
        logits_BTV = torch.zeros_like(laid.logits_BTV).masked_scatter(
            valid_BT[..., None], logits_NV
        )
        sums = loss(logits_BTV, laid.batch).sums
        return sum((loss.weights[k] * v for k, v in sums.items()), torch.zeros(()).double())

    assert torch.autograd.gradcheck(total, (start_NV,), atol=1e-7)


def test_cispo_gradient() -> None:
    """d/dlogp = -clip(r) A, also where PPO's clip would have stopped the gradient."""
    samples = make_samples(2, [(0, 5)], spread=1.5)
    config = PolicyLossConfig(ratio="cispo", clip_low=0.5, clip_high=0.5, aggregation="token_sum")
    _, grads = run(GRPOLoss(config), [lay_out([samples], 5, packed=False)])
    s = samples[0]
    logits_TV = s.logits_TV.clone().requires_grad_()
    logp_T = torch.log_softmax(logits_TV, -1)[torch.arange(5), s.targets_T]
    weight_T = (logp_T.detach() - s.old_T).exp().clamp(0.5, 1.5)
    (-(weight_T * s.advantage * logp_T).sum()).backward()
    torch.testing.assert_close(grads[id(s)], logits_TV.grad, rtol=1e-12, atol=1e-14)
    assert ((weight_T == 0.5) | (weight_T == 1.5)).any()


@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
def test_step_zero_is_the_policy_gradient(ratio: str) -> None:
    """Trap 11: with old = current the ratio is exactly 1 and the gradient is that of -A logp."""
    samples = make_samples(8, LENGTHS, 0.0)
    config = PolicyLossConfig(ratio=ratio, clip_low=3e-4, clip_high=4e-4)  # type: ignore[arg-type]
    part = lay_out([[s] for s in samples], 8, packed=False)
    without = {k: v for k, v in part.batch.extras.items() if k == "advantages_BT"}
    part.batch.extras.clear()
    part.batch.extras.update(without)
    loss = GRPOLoss(config, temperature=0.6)
    metrics = loss(part.logits_BTV, part.batch).metrics
    assert float(metrics["ratio_mean"][0]) == float(metrics["ratio_mean"][1])
    assert float(metrics["clip_fraction"][0]) == 0.0
    assert float(metrics["approx_kl"][0]) == 0.0
    _, grads = run(loss, [part])
    num_tokens = sum(int(s.mask_T.sum()) for s in samples)
    for s in samples:
        logits_TV = s.logits_TV.clone().requires_grad_()
        logp_T = torch.log_softmax(logits_TV / 0.6, -1)[torch.arange(s.length), s.targets_T]
        (-s.advantage * logp_T[s.mask_T].sum() / num_tokens).backward()
        torch.testing.assert_close(grads[id(s)], logits_TV.grad, rtol=1e-12, atol=1e-14)


def test_temperature_divides_logits_not_log_probabilities() -> None:
    """Trap 4."""
    samples = make_samples(8, [(1, 4)], 0.0)
    part = lay_out([samples], 5, packed=False)
    metrics = GRPOLoss(PolicyLossConfig(), temperature=2.0)(part.logits_BTV, part.batch).metrics
    total, number = (float(x) for x in metrics["entropy_estimate"])
    mask_T = samples[0].mask_T
    assert number == 4
    assert total == pytest.approx(-float(samples[0].logprobs(2.0)[mask_T].sum()), rel=1e-12)
    assert total != pytest.approx(-float(samples[0].logprobs(1.0)[mask_T].sum()) / 2.0, rel=1e-3)


def test_metrics_say_how_often_the_clip_binds() -> None:
    """log r = +1, -1, +1, -1 under A = 1, 1, -1, -1: the clip binds on the first and the last."""
    samples = make_samples(8, [(0, 1)] * 4, 0.0)
    for s, gap, advantage in zip(samples, [1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]):
        s.old_T, s.advantage = s.logprobs() - gap, advantage
    part = lay_out([[s] for s in samples], 1, packed=False)
    metrics = GRPOLoss(PolicyLossConfig())(part.logits_BTV, part.batch).metrics
    got = {k: float(a) / float(b) for k, (a, b) in metrics.items()}
    assert got["clip_high_fraction"] == 0.25
    assert got["clip_low_fraction"] == 0.25
    assert got["clip_fraction"] == 0.5
    assert got["ratio_mean"] == pytest.approx(math.cosh(1.0))
    assert got["approx_kl"] == pytest.approx(math.cosh(1.0) - 1.0)


def test_huge_ratios_stay_finite() -> None:
    gap = torch.tensor([1e4, -1e4], dtype=torch.float32, requires_grad=True)
    loss = clipped_surrogate(gap, torch.tensor([-1.0, 1.0]), 0.2, 0.2)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert gap.grad is not None and not gap.grad.any()
    bounded = clipped_surrogate(gap.detach(), torch.tensor([-1.0, 1.0]), 0.2, 0.2, dual_clip=3.0)
    assert bounded[0] == 3.0


def test_importance_weights_carry_no_gradient() -> None:
    old = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for level in ("token", "sequence"):
        weights = truncated_importance(old, torch.tensor([[-5.0, 0.5]]), mask, 2.0, level)  # type: ignore[arg-type]
        assert not weights.requires_grad
        assert float(weights.max()) == 2.0


finite = st.floats(-8, 8)
DOUBLE: Any = {"dtype": torch.float64}


@given(finite, finite)
def test_kl_estimators(logp: float, ref: float) -> None:
    for kind in ("k1", "k2", "k3"):
        got = kl_estimate(kind, torch.tensor(logp, **DOUBLE), torch.tensor(ref, **DOUBLE))  # type: ignore[arg-type]
        assert float(got) == pytest.approx(naive_kl(kind, logp, ref), rel=1e-9, abs=1e-12)
        assert kind == "k1" or float(got) >= -1e-15


def expected_gradient(kind: str, logits: Tensor, ref: Tensor) -> Tensor:
    """Exact expectation, over the policy's own samples, of the estimator's gradient."""
    probs = torch.softmax(logits, -1).detach()
    leaf = logits.clone().requires_grad_()
    logp = torch.log_softmax(leaf, -1)
    (probs * kl_estimate(kind, logp, ref)).sum().backward()  # type: ignore[arg-type]
    assert leaf.grad is not None
    return leaf.grad


def test_which_kl_is_right_as_a_loss() -> None:
    """k2's expected gradient is that of KL(policy || ref), k3's of KL(ref || policy), k1's 0."""
    torch.manual_seed(0)
    logits, ref = torch.randn(5).double(), torch.log_softmax(torch.randn(5).double(), -1)
    leaf = logits.clone().requires_grad_()
    logp = torch.log_softmax(leaf, -1)
    (reverse,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), leaf, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), leaf)
    torch.testing.assert_close(expected_gradient("k2", logits, ref), reverse)
    torch.testing.assert_close(expected_gradient("k3", logits, ref), forward)
    torch.testing.assert_close(expected_gradient("k1", logits, ref), torch.zeros(5).double())
    # As values k1 and k3 are both unbiased.
    value = torch.log_softmax(logits, -1)
    true = (value.exp() * (value - ref)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((value.exp() * kl_estimate(kind, value, ref)).sum(), true)  # type: ignore[arg-type]


def test_causal_lm_equals_cross_entropy() -> None:
    samples = make_samples(1, LENGTHS, 0.0)
    part = lay_out([[s] for s in samples], 8, packed=False)
    value, _ = run(CausalLM(), [part])
    rows = torch.cat([s.logits_TV[s.mask_T] for s in samples])
    targets = torch.cat([s.targets_T[s.mask_T] for s in samples])
    assert value == pytest.approx(float(torch.nn.functional.cross_entropy(rows, targets)))
    hits, number = CausalLM(accuracy=True)(part.logits_BTV, part.batch).metrics["accuracy"]
    assert float(hits) == float((rows.argmax(-1) == targets).sum())
    assert float(number) == len(targets)


def test_segments_and_their_first_valid_token() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 5, 5, 5, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 1]], dtype=torch.bool)
    assert sequence_sum(mask.double(), segments).tolist() == [
        [2, 2, 2, 2, 2, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert first_valid(mask, segments).int().tolist() == [[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1]]
    assert first_valid(mask).int().tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]


def test_missing_inputs_are_named() -> None:
    part = lay_out([make_samples(1, [(1, 2)], 0.1)], 4, packed=True)
    del part.batch.extras["ref_logprobs_BT"], part.batch.extras["rollout_logprobs_BT"]
    with pytest.raises(ValueError, match="ref_logprobs_BT"):
        GRPOLoss(PolicyLossConfig(kl="k2", kl_coef=0.1))(part.logits_BTV, part.batch)
    with pytest.raises(ValueError, match="rollout_logprobs_BT"):
        GRPOLoss(PolicyLossConfig(importance_cap=2.0))(part.logits_BTV, part.batch)
    del part.batch.extras["advantages_BT"]
    with pytest.raises(ValueError, match="advantages_BT"):
        GRPOLoss(PolicyLossConfig())(part.logits_BTV, part.batch)
    with pytest.raises(ConfigError, match="length_constant"):
        GRPOLoss(PolicyLossConfig(aggregation="constant"))
    with pytest.raises(ConfigError, match="length_constant"):
        fold("constant", torch.ones(1, 1, dtype=torch.bool))
