"""Process rewards: the score of each step of an answer, its loss, and one score of them all.

A step's score s is the scalar head's number at the step's last token; sigmoid(s) is the chance that
the step is right. Lightman et al. 2023, "Let's Verify Step by Step"; soft labels and the minimum:
Wang et al. 2023, "Math-Shepherd", sections 3.2 and 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.config import STEP_PLACES, Aggregate
from shardwise.losses.contract import LossOutput
from shardwise.losses.ranking import rights
from shardwise.ops.logits import Logits, selected_values

# Shape suffixes: B rows, T tokens, N steps.


class StepLoss:
    """-(y log p + (1 - y) log(1 - p)) summed over steps, p = sigmoid(score); counts them.

    ``loss_mask_BT`` marks steps' last tokens; reads ``extras["label_BT"]`` there, in [0, 1].
    """

    weights: Mapping[str, float] = {"step": 1.0}

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """Steps."""
        return {"step": batch.loss_mask_BT.sum(dtype=torch.float64)}

    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """The sum in nats over this micro-batch's steps; metrics over them."""
        score_BT = selected_values(logits_BTV, batch.loss_mask_BT)
        score_N = score_BT.flatten().index_select(0, batch.valid())
        label_N = batch.extras["label_BT"].flatten()[batch.valid()]
        return LossOutput({"step": step_loss(score_N, label_N).sum()}, _metrics(score_N, label_N))


def step_loss(score_N: Tensor, label_N: Tensor) -> Tensor:
    """Cross-entropy of each step [N] in nats, against a label in [0, 1]."""
    label_N = label_N.to(score_N.dtype)
    return F.binary_cross_entropy_with_logits(score_N, label_N, reduction="none")


@torch.no_grad()
def hits(score_N: Tensor, label_N: Tensor) -> Tensor:
    """1 where score and label (above 1/2) are on one side, 1/2 for a score of 0 [N], float64."""
    side_N = torch.where(label_N > 0.5, 1.0, -1.0) * score_N.double()
    return rights(side_N, torch.finfo(score_N.dtype).eps * torch.ones_like(side_N))


@torch.no_grad()
def _metrics(score_N: Tensor, label_N: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    number = score_N.new_full((), len(score_N), dtype=torch.float64)
    return {
        "step_accuracy": (hits(score_N, label_N).sum(), number),
        "step_score": (torch.sigmoid(score_N.double()).sum(), number),
        "step_label": (label_N.double().sum(), number),
    }


def calibration_error(chance_N: Tensor, label_N: Tensor, bins: int = 10) -> float:
    """Expected calibration error of chances against labels, hard or soft.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3, of one class: over
    bins of the chance, the gap between the mean chance and the mean label, weighted by size.
    """
    if not len(chance_N):
        return 0.0
    index_N = (chance_N.double() * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.index_add_(0, index_N, chance_N.double() - label_N.double())
    return float(gap.abs().sum() / len(chance_N))


def aggregate(score_N: np.ndarray, how: Aggregate) -> float:
    """One score of an answer in [0, 1], from its steps' scores as the head gives them (float64)."""
    chance_N = 1.0 / (1.0 + np.exp(-np.clip(score_N, -700.0, 700.0)))
    if how == "last":
        return float(chance_N[-1])
    if how == "min":
        return float(chance_N.min())
    return float(chance_N.prod() if how == "product" else chance_N.mean())


def measures(scores: Sequence[np.ndarray], labels: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Validation figures of many answers' steps: loss, accuracy in all and by place, calibration.

    ``answer_accuracy_*``: how often an aggregate above 1/2 says that all steps are right.
    """
    score_N = torch.from_numpy(np.concatenate(scores))
    label_N = torch.tensor([y for of_answer in labels for y in of_answer], dtype=torch.float64)
    found = {k: float(a / b) for k, (a, b) in _metrics(score_N, label_N).items()}
    found["loss"] = float(step_loss(score_N, label_N).mean())
    found["calibration_error"] = calibration_error(torch.sigmoid(score_N), label_N)
    place_N = torch.cat([torch.arange(len(of_answer)) for of_answer in labels])
    hit_N = hits(score_N, label_N)
    for name, first, end in STEP_PLACES:
        if (here_N := (place_N >= first) & (place_N < end)).any():
            found[name] = float(hit_N[here_N].mean())
    right = np.array([min(of_answer) > 0.5 for of_answer in labels])
    for kind in get_args(Aggregate):
        said = np.array([aggregate(of_answer, kind) > 0.5 for of_answer in scores])
        found[f"answer_accuracy_{kind}"] = float((said == right).mean())
    return found
