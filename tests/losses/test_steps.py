"""Losses of steps against plain Python; no cut of a batch changes one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.data.steps import Solution, collate_solutions
from shardwise.losses.config import Aggregate
from shardwise.losses.steps import StepLoss, aggregate, calibration_error, measures, step_loss

F64 = torch.float64


def test_loss_is_the_cross_entropy_of_hard_and_soft_labels() -> None:
    scores, labels = [0.3, -1.2, 2.0, -800.0], [1.0, 0.0, 0.25, 1.0]
    expected = []
    for s, y in zip(scores[:3], labels[:3], strict=True):
        p = 1 / (1 + math.exp(-s))
        expected.append(-y * math.log(p) - (1 - y) * math.log(1 - p))
    found = step_loss(torch.tensor(scores, dtype=F64), torch.tensor(labels, dtype=F64))
    torch.testing.assert_close(found, torch.tensor([*expected, 800.0], dtype=F64))


@pytest.mark.parametrize(
    ("how", "expected"), [("min", 0.2), ("product", 0.09), ("last", 0.5), ("mean", 1.6 / 3)]
)
def test_aggregates(how: Aggregate, expected: float) -> None:
    chances = np.array([0.9, 0.2, 0.5])
    assert aggregate(np.log(chances / (1 - chances)), how) == pytest.approx(expected, abs=1e-12)
    assert aggregate(np.array([-1e300]), how) == pytest.approx(0.0, abs=1e-300)


def test_calibration_error() -> None:
    # 8 steps at 0.75 of which 6 right, 2 at 0.15 with soft labels of 0.5: 0 and 0.35 off.
    p = torch.tensor([0.75] * 8 + [0.15] * 2, dtype=F64)
    y = torch.tensor([1.0] * 6 + [0.0] * 2 + [0.5] * 2, dtype=F64)
    assert calibration_error(p, y) == pytest.approx(0.2 * 0.35, abs=1e-12)
    assert calibration_error(p[:0], y[:0]) == 0.0


def test_measures_tell_steps_by_place_and_answers_by_aggregate() -> None:
    scores = [np.array([2.0, -1.0]), np.array([1.0, 1.0, 1.0, 0.0]), np.ones(10)]
    labels = [[1.0, 1.0], [1.0, 0.9, 0.2, 0.0], [1.0] * 10]
    found = measures(scores, labels)
    assert found["step_accuracy_1"] == 1.0 and found["step_accuracy_2"] == pytest.approx(2 / 3)
    assert found["step_accuracy_4"] == 0.75  # a score of 0 says nothing: half
    assert found["step_accuracy_later"] == 1.0
    assert found["step_accuracy"] == pytest.approx((1 + 2 + 0.5 + 10) / 16)
    # The first is right and the second wrong; by the mean, the other way round.
    assert found["answer_accuracy_min"] == pytest.approx(2 / 3)
    assert found["answer_accuracy_last"] == pytest.approx(2 / 3)
    assert found["answer_accuracy_mean"] == pytest.approx(2 / 3)
    assert found["answer_accuracy_product"] == pytest.approx(1 / 3)


def made() -> list[Solution]:
    g = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(5, 30, (n,), generator=g).tolist()

    return [
        Solution(ids(p), ids(n), ends, [round(0.3 * (i % 4), 1) for i in range(len(ends))])
        for p, n, ends in ((4, 5, [1, 4]), (2, 1, [0]), (6, 9, [0, 3, 5, 8]), (3, 3, [2]))
    ]


def test_no_cut_of_the_batch_changes_sums_and_other_tokens_are_not_read() -> None:
    loss, solutions = StepLoss(), made()

    def head(batch: MicroBatch) -> Tensor:
        ids = batch.input_ids_BT.double()
        return torch.sin(ids + 0.1 * batch.position_ids_BT)[..., None]

    def totals(cuts: list[list[int]], pad: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for rows in cuts:
            some = [solutions[i] for i in rows]
            batch = collate_solutions(some, rows, 0, num_real=len(rows), pad_multiple=pad)
            outputs = torch.where(batch.loss_mask_BT[..., None], head(batch), torch.nan)
            outputs.requires_grad_()
            out = loss(outputs, batch)
            out.sums["step"].backward()
            assert outputs.grad is not None
            assert (outputs.grad[..., 0] != 0).equal(batch.loss_mask_BT)
            sums = {k: v.detach() for k, v in out.sums.items()}
            parts = {**sums, **{f"n {k}": v for k, v in loss.counts(batch).items()}}
            parts |= {f"m {k}": v[0] for k, v in out.metrics.items()}
            for name, value in parts.items():
                found[name] = found.get(name, 0.0) + float(value)
        return found

    whole = totals([[0, 1, 2, 3]], 1)
    assert whole["n step"] == 8
    for cuts, pad in (([[0], [1], [2], [3]], 16), ([[3, 1], [0, 2]], 7)):
        assert totals(cuts, pad) == pytest.approx(whole, rel=1e-12)
