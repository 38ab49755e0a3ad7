"""Trap 1: one batch gives one gradient, however it is cut, padded or packed. Trap 2: NaN outside
the mask reaches nothing (every batch here is full of it, see support.lay_out)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.config import PolicyLossConfig
from shardwise.losses.contract import Loss
from shardwise.losses.grpo import GRPOLoss
from tests.losses.support import Laid, Sample, lay_out, make_samples, run

LOSSES: dict[str, Loss] = {
    "causal_lm": CausalLM(accuracy=True),
    **{
        f"{ratio}-{aggregation}": GRPOLoss(
            PolicyLossConfig(
                ratio=ratio,  # type: ignore[arg-type]
                aggregation=aggregation,  # type: ignore[arg-type]
                length_constant=11,
                kl="k3",
                kl_coef=0.1,
                importance_cap=1.5,
                importance_level="sequence" if ratio == "sequence" else "token",
            ),
            temperature=0.7,
        )
        for ratio in ("token", "sequence", "cispo")
        for aggregation in (
            "token_mean",
            "token_sum",
            "seq_mean_token_mean",
            "seq_mean_token_sum",
            "constant",
        )
    },
}


def draw_layout(data: st.DataObject, samples: list[Sample]) -> list[Laid]:
    """Cut into micro-batches of rows, each row one sample or several, each padded by some."""
    packed = data.draw(st.booleans(), label="packed")
    order = data.draw(st.permutations(samples))
    rows: list[list[Sample]] = []
    for sample in order:
        if packed and rows and data.draw(st.booleans()):
            rows[-1].append(sample)
        else:
            rows.append([sample])
    parts: list[list[list[Sample]]] = []
    for row in rows:
        if parts and data.draw(st.booleans()):
            parts[-1].append(row)
        else:
            parts.append([row])
    laid = []
    for part in parts:
        longest = max(sum(s.length for s in row) for row in part)
        laid.append(lay_out(part, longest + data.draw(st.integers(0, 5)), packed))
    return laid


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_split_has_the_same_gradient(name: str, data: Any) -> None:
    lengths = data.draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=6).filter(
            lambda pairs: all(p + r > 0 for p, r in pairs)
        )
    )
    samples = make_samples(data.draw(st.integers(0, 999)), lengths, spread=0.3)
    width = max(s.length for s in samples)
    value, grads = run(LOSSES[name], [lay_out([[s] for s in samples], width, packed=False)])
    other_value, other_grads = run(LOSSES[name], draw_layout(data, samples))
    assert other_value == pytest.approx(value, rel=1e-10, abs=1e-12)
    for key, grad_TV in grads.items():
        torch.testing.assert_close(other_grads[key], grad_TV, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_there_at_all(name: str) -> None:
    samples = make_samples(3, [(2, 4), (1, 6)], spread=0.05)
    _, grads = run(LOSSES[name], [lay_out([[s] for s in samples], 9, packed=False)])
    for s in samples:
        assert bool((grads[id(s)][s.mask_T].abs().sum(-1) > 0).any())
        assert torch.isfinite(grads[id(s)]).all()


@pytest.mark.parametrize("name", ["causal_lm", "token-token_mean", "sequence-seq_mean_token_mean"])
def test_metrics_are_invariant_too(name: str) -> None:
    samples = make_samples(5, [(2, 4), (1, 6), (0, 3)], spread=0.3)
    layouts = [
        [lay_out([[s] for s in samples], 8, packed=False)],
        [lay_out([samples[:2]], 15, packed=True), lay_out([samples[2:]], 3, packed=True)],
    ]
    results = []
    for layout in layouts:
        totals: dict[str, tuple[float, float]] = {}
        for part in layout:
            for key, (top, count) in LOSSES[name](part.logits_BTV, part.batch).metrics.items():
                a, b = totals.get(key, (0.0, 0.0))
                totals[key] = (a + float(top), b + float(count))
        results.append({k: a / b for k, (a, b) in totals.items()})
    assert results[0].keys() == results[1].keys() and results[0]
    for key, value in results[0].items():
        assert results[1][key] == pytest.approx(value, rel=1e-12), key


@pytest.mark.parametrize("name", ["causal_lm", "token-token_mean", "cispo-seq_mean_token_mean"])
def test_nothing_valid_is_zero_with_zero_gradient(name: str) -> None:
    samples = make_samples(5, [(3, 0)], spread=0.3)
    value, grads = run(LOSSES[name], [lay_out([samples], 5, packed=False)])
    assert value == 0.0
    assert not grads[id(samples[0])].any()
