"""Preference losses against the papers, in plain Python; no cut of a batch changes one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from shardwise.data.batch import MicroBatch, join
from shardwise.data.preferences import Ranking, collate_rankings
from shardwise.losses.preference import Answers, PreferenceLoss, divergence_score
from shardwise.losses.preference_config import AnyPreference, PreferenceConfig
from shardwise.losses.presets import PREFERENCE_PRESETS
from tests.verify.edits import applied
from tests.verify.preference_bugs import FORMULA_BUGS

F64 = torch.float64
# Log-probabilities a token of (chosen, rejected), of the policy and of the reference.
PAIRS = [
    (([-0.5, -1.0, -0.2], [-2.0, -0.1]), ([-0.7, -1.1, -0.4], [-1.0, -0.3])),
    (([-0.9], [-0.3, -0.8, -1.2, -0.1]), ([-0.4], [-0.5, -0.9, -1.0, -0.6])),
]


def config(**said: Any) -> PreferenceConfig:
    found: PreferenceConfig = TypeAdapter(AnyPreference).validate_python(said)
    return found


def answers(**more: Any) -> Answers:
    flat = [list(side) for (ours, theirs) in PAIRS for side in zip(ours, theirs, strict=True)]
    sizes = torch.tensor([len(ours) for ours, _ in flat])
    return Answers(
        torch.tensor([x for ours, _ in flat for x in ours], dtype=F64),
        torch.tensor([x for _, theirs in flat for x in theirs], dtype=F64),
        torch.repeat_interleave(torch.arange(len(flat)), sizes),
        torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=F64),
        torch.tensor([0, 0, 1, 1]),
        **more,
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smoothed(d: float, e: float) -> float:
    return -(1 - e) * log_sigmoid(d) - e * log_sigmoid(-d)


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


def ratios(pair: Any) -> tuple[float, float]:
    (w, lose), (ref_w, ref_l) = pair
    return sum(w) - sum(ref_w), sum(lose) - sum(ref_l)


def gap(pair: Any) -> float:
    return ratios(pair)[0] - ratios(pair)[1]


def means(pair: Any) -> tuple[float, float]:
    return sum(pair[0][0]) / len(pair[0][0]), sum(pair[0][1]) / len(pair[0][1])


def gap_a_token(pair: Any) -> float:
    return ratios(pair)[0] / len(pair[0][0]) - ratios(pair)[1] / len(pair[0][1])


def desensitised(pair: Any, alpha: float) -> float:
    """By the definition: tokens beyond the shorter answer weigh alpha."""
    shared = min(len(pair[0][0]), len(pair[0][1]))
    total = 0.0
    for sign, ours, theirs in ((1, pair[0][0], pair[1][0]), (-1, pair[0][1], pair[1][1])):
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            total += sign * (a - b) * (1.0 if place < shared else alpha)
    return total


def exo(d: float, e: float) -> float:
    p = sigmoid(d)
    return p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e)


def discopop(d: float, tau: float) -> float:
    share = sigmoid(d / tau)
    return -log_sigmoid(d) * (1 - share) + math.exp(-d) * share


def robust(d: float, e: float) -> float:
    return (-(1 - e) * log_sigmoid(d) + e * log_sigmoid(-d)) / (1 - 2 * e)


B = 0.3
FORMULAS: list[tuple[dict[str, Any], Any]] = [
    ({"beta": B}, lambda p: -log_sigmoid(B * gap(p))),
    ({"beta": B, "label_smoothing": 0.2}, lambda p: smoothed(B * gap(p), 0.2)),
    ({"beta": B, "length_normalised": True}, lambda p: -log_sigmoid(B * gap_a_token(p))),
    ({"beta": B, "ld_alpha": 0.4}, lambda p: -log_sigmoid(B * desensitised(p, 0.4))),
    ({"kind": "robust", "beta": B, "label_smoothing": 0.1}, lambda p: robust(B * gap(p), 0.1)),
    ({"kind": "ipo", "beta": B}, lambda p: (gap_a_token(p) - 1 / (2 * B)) ** 2),
    ({"kind": "hinge", "beta": B}, lambda p: max(0.0, 1 - B * gap(p))),
    ({"kind": "exo", "beta": B, "label_smoothing": 0.01}, lambda p: exo(B * gap(p), 0.01)),
    ({"kind": "discopop", "beta": B, "tau": 0.1}, lambda p: discopop(B * gap(p), 0.1)),
    ({"kind": "apo_zero", "beta": B},
     lambda p: 1 - sigmoid(B * ratios(p)[0]) + sigmoid(B * ratios(p)[1])),
    ({"kind": "apo_down", "beta": B},
     lambda p: sigmoid(B * ratios(p)[0]) + 1 - sigmoid(B * gap(p))),
    ({"kind": "slic", "margin": 2.0}, lambda p: max(0.0, 2 - sum(p[0][0]) + sum(p[0][1]))),
    ({"kind": "simpo", "beta": B, "margin": 0.5},
     lambda p: -log_sigmoid(B * (means(p)[0] - means(p)[1]) - 0.5)),
    ({"kind": "orpo", "beta": B, "sft_weight": 0.0},
     lambda p: -B * log_sigmoid(log_odds(means(p)[0]) - log_odds(means(p)[1]))),
    ({"kind": "cpo", "beta": B, "sft_weight": 0.0},
     lambda p: -log_sigmoid(B * (sum(p[0][0]) - sum(p[0][1])))),
]  # fmt: skip


@pytest.mark.parametrize(("said", "formula"), FORMULAS)
def test_losses_are_the_papers(said: dict[str, Any], formula: Any) -> None:
    loss = PreferenceLoss(config(**said))
    assert float(loss.counts_of(answers())["preference"]) == 2
    expected = sum(formula(pair) for pair in PAIRS)
    assert float(loss.of(answers()).sums["preference"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("said", "derivative"),
    [
        ({"divergence": "forward_kl"}, lambda t: 1 - 1 / t),
        ({"divergence": "js"}, lambda t: math.log(2 * t / (t + 1))),
        ({"divergence": "alpha", "divergence_alpha": 0.3}, lambda t: (t**-0.7 - 1) / -0.7),
        ({"divergence": "alpha", "divergence_alpha": 1.0}, math.log),
    ],
)
def test_divergences_are_the_papers(said: dict[str, Any], derivative: Any) -> None:
    found = PreferenceLoss(config(beta=B, **said)).of(answers()).sums["preference"]
    gaps = [[derivative(math.exp(r)) for r in ratios(p)] for p in PAIRS]
    expected = sum(-log_sigmoid(B * (a - b)) for a, b in gaps)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_far_from_the_reference_nothing_overflows() -> None:
    far = torch.tensor([-300.0, 300.0], requires_grad=True)
    for kind, order in (("forward_kl", None), ("alpha", 0.5), ("alpha", 3.0), ("js", None)):
        score = divergence_score(kind, far, order)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(score.sum(), far)
        assert torch.isfinite(score).all() and torch.isfinite(gradient).all()


def test_kto_takes_answers_one_by_one() -> None:
    kto = config(kind="kto", beta=B, desirable_weight=1.5, undesirable_weight=0.5)
    z = 0.4
    baseline = torch.full((4,), z, dtype=F64, requires_grad=True)
    loss = PreferenceLoss(kto)
    found = loss.of(answers(baseline_N=baseline))
    expected = sum(
        1.5 * (1 - sigmoid(B * (ratios(p)[0] - z))) + 0.5 * (1 - sigmoid(B * (z - ratios(p)[1])))
        for p in PAIRS
    )
    assert float(found.sums["preference"]) == pytest.approx(expected, rel=1e-12)
    assert not found.sums["preference"].requires_grad  # the baseline has no gradient
    assert float(loss.counts_of(answers(baseline_N=baseline))["preference"]) == 4
    total, number = found.metrics["rewards_chosen"]
    assert float(number) == 2
    assert float(total) == pytest.approx(B * sum(ratios(p)[0] for p in PAIRS))


@pytest.mark.parametrize(
    ("how", "expected", "count"),
    [
        ("token_mean", 2.6, 4),
        ("seq_mean_token_sum", 2.6, 2),
        ("seq_mean_token_mean", 1.7 / 3 + 0.9, 2),
    ],
)
def test_the_sft_term_is_of_the_chosen_alone(how: str, expected: float, count: int) -> None:
    loss = PreferenceLoss(config(sft_weight=0.5, sft_aggregation=how))
    assert loss.weights["sft"] == 0.5
    assert float(loss.of(answers()).sums["sft"]) == pytest.approx(expected)
    assert float(loss.counts_of(answers())["sft"]) == count


def test_metrics_say_where_both_sides_go() -> None:
    found = PreferenceLoss(config(beta=B)).of(answers()).metrics
    said = {name: float(total) / float(number) for name, (total, number) in found.items()}
    assert said["margin"] == pytest.approx(B * sum(map(gap, PAIRS)) / 2)
    assert said["margin"] == pytest.approx(said["rewards_chosen"] - said["rewards_rejected"])
    assert said["pair_accuracy"] == sum(gap(p) > 0 for p in PAIRS) / 2
    assert said["ranking_accuracy"] == sum(sum(p[0][0]) > sum(p[0][1]) for p in PAIRS) / 2
    assert said["drift_chosen"] == pytest.approx(sum(ratios(p)[0] for p in PAIRS) / 2)
    assert said["logps_rejected"] == pytest.approx(sum(sum(p[0][1]) for p in PAIRS) / 2)


@pytest.mark.parametrize("kind", ["sigmoid", "simpo"])
def test_a_gap_of_roundings_is_a_tie(kind: str) -> None:
    """Of a policy that is its reference, a rounding decides the sign of every gap."""
    theirs = answers()
    ours = theirs.ref_M if kind == "sigmoid" else theirs.logp_M.new_tensor([-0.3] * 10)
    for off, accuracy in ((1e-15, 0.5), (-1e-15, 0.5), (1e-6, 1.0), (-1e-6, 0.0)):
        first_of_pair = torch.isin(theirs.answer_M, torch.tensor([0, 2]))
        moved = dataclasses.replace(theirs, logp_M=ours + off * first_of_pair)
        right, number = PreferenceLoss(config(kind=kind)).of(moved).metrics["pair_accuracy"]
        assert float(right / number) == accuracy


# --- batches ------------------------------------------------------------------------------------

VOCAB = 7


def rankings() -> list[Ranking]:
    g = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=g).tolist()

    lengths = [(4, [2, 3]), (2, [1, 5, 2]), (6, [3, 1]), (3, [2, 2])]
    return [
        Ranking(ids(p), [ids(n) for n in many], [float(-i) for i in range(len(many))])
        for p, many in lengths
    ]


def batch_of(some: Sequence[Ranking], first: int, pad: int) -> tuple[MicroBatch, Tensor]:
    """A micro-batch and its logits; what stands outside of the answers is NaN."""
    values = {"ref_logprobs_BT": -0.3, "baseline_BT": 0.2}
    per_token = {name: [[v] * len(r.answers) for r in some] for name, v in values.items()}
    ids = range(first, first + len(some))
    batch = collate_rankings(
        some, ids, VOCAB, num_real=len(some), pad_multiple=pad, scored=False, per_token=per_token
    )
    logits_BTV = torch.full((*batch.targets_BT.shape, VOCAB), torch.nan, dtype=F64)
    for b, row in enumerate(ids):
        g = torch.Generator().manual_seed(row)
        number = int(batch.loss_mask_BT[b].sum())
        drawn = torch.randn(number, VOCAB, generator=g, dtype=F64)
        logits_BTV[b, batch.loss_mask_BT[b]] = drawn
    return batch, logits_BTV.requires_grad_()


def total_and_gradients(loss: PreferenceLoss, parts: Sequence[tuple[MicroBatch, Tensor]]) -> Any:
    totals: dict[str, Tensor] = {}
    for batch, _ in parts:
        for name, count in loss.counts(batch).items():
            totals[name] = totals.get(name, torch.zeros((), dtype=F64)) + count
    value, rows = 0.0, []
    for batch, logits_BTV in parts:
        sums = loss(logits_BTV, batch).sums
        objective = torch.stack([loss.weights[n] * s / totals[n] for n, s in sums.items()]).sum()
        (gradient_BTV,) = torch.autograd.grad(objective, logits_BTV)
        assert not gradient_BTV[~batch.loss_mask_BT].any()  # prompts and padding
        value += float(objective.detach())
        rows += [g[m] for g, m in zip(gradient_BTV, batch.loss_mask_BT, strict=True)]
    return value, torch.cat(rows)


@pytest.mark.parametrize(
    "said",
    [
        {"label_smoothing": 0.1, "sft_weight": 0.3},
        {"ld_alpha": 0.5},
        {"kind": "ipo"},
        {"kind": "kto"},
        {"kind": "orpo"},
    ],
)
def test_no_cut_of_the_batch_changes_loss_or_gradient(said: dict[str, Any]) -> None:
    loss, some = PreferenceLoss(config(**said)), rankings()
    whole, gradients = total_and_gradients(loss, [batch_of(some, 0, 1)])
    cuts = [[1, 1, 1, 1], [3, 1], [2, 2]]
    for cut in cuts:
        parts, first = [], 0
        for size in cut:
            parts.append(batch_of(some[first : first + size], first, 16))
            first += size
        again, others = total_and_gradients(loss, parts)
        assert again == pytest.approx(whole, rel=1e-12)
        torch.testing.assert_close(others, gradients, rtol=1e-10, atol=1e-14)


def test_all_pairs_of_a_ranking_weigh_one_together() -> None:
    [three] = [r for r in rankings() if len(r.answers) == 3]
    loss = PreferenceLoss(config(), with_reference=False)
    batch, logits_BTV = batch_of([three], 1, 1)
    assert float(loss.counts(batch)["preference"]) == 1.0
    found = []
    for better, worse in ((0, 1), (0, 2), (1, 2)):
        valid_BT = batch.loss_mask_BT.clone()
        start = len(three.prompt) - 1
        for i, answer in enumerate(three.answers):
            valid_BT[0, start : start + len(answer)] = i in (better, worse)
            start += len(answer)
        pair = dataclasses.replace(batch, loss_mask_BT=valid_BT)
        found.append(float(loss(logits_BTV, pair).sums["preference"]))
    whole = float(loss(logits_BTV, batch).sums["preference"])
    assert whole == pytest.approx(sum(found) / 3, rel=1e-12)


def test_at_the_start_nothing_is_preferred() -> None:
    """The policy is its reference: margins are exactly 0, in fp32 as well."""
    for dtype in (F64, torch.float32):
        batch, logits_BTV = batch_of(rankings(), 0, 1)
        logits = logits_BTV.detach().to(dtype)
        table = torch.log_softmax(logits, -1).gather(-1, batch.targets_BT.clamp(max=6)[..., None])
        batch.extras["ref_logprobs_BT"] = table[..., 0].double()
        found = PreferenceLoss(config())(logits, batch)
        assert float(found.metrics["margin"][0]) == pytest.approx(0.0, abs=1e-6)
        assert float(found.sums["preference"]) == pytest.approx(4 * math.log(2), abs=1e-6)


def test_a_batch_without_answers_is_zero_with_a_gradient() -> None:
    batch, logits_BTV = batch_of(rankings()[:1], 0, 1)
    batch = join([batch])
    batch.loss_mask_BT[:] = False
    found = PreferenceLoss(config(sft_weight=1.0))(logits_BTV, batch)
    total = torch.stack(list(found.sums.values())).sum()
    assert float(total) == 0.0
    (gradient,) = torch.autograd.grad(total, logits_BTV)
    assert not gradient.any()


# --- settings -----------------------------------------------------------------------------------


def test_each_kind_has_its_own_keys() -> None:
    assert config().kind == "sigmoid"
    for said in ({"kind": "simpo", "ld_alpha": 0.5}, {"kind": "kto", "sft_weight": 1.0},
                 {"kind": "dpo"}, {"divergence": "alpha"}, {"divergence_alpha": 0.5},
                 {"label_smoothing": 0.5}, {"kind": "exo", "label_smoothing": 0.0}):  # fmt: skip
        with pytest.raises(ValidationError):
            config(**said)


@pytest.mark.parametrize("name", FORMULA_BUGS)
def test_planted_bugs_differ_from_the_papers(name: str) -> None:
    """Lines that every layout shares: verify cannot see them, these formulas do."""
    checks: list[Any] = [lambda c=case: test_losses_are_the_papers(*c) for case in FORMULAS]
    checks += [test_kto_takes_answers_one_by_one]
    checks += [lambda: test_the_sft_term_is_of_the_chosen_alone("token_mean", 2.6, 4)]
    for check in checks:
        check()
    with applied([FORMULA_BUGS[name]]):
        assert any(_fails(check) for check in checks)


def _fails(check: Any) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", PREFERENCE_PRESETS)
def test_presets_fill_what_is_not_said(name: str) -> None:
    preset = PREFERENCE_PRESETS[name]
    found = config(preset=name)
    assert {k: getattr(found, k) for k in preset.settings} == preset.settings and preset.source
    assert getattr(config(preset=name, beta=0.7), "beta") == 0.7  # noqa: B009
