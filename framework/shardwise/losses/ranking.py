"""Losses of outcome reward models: human (or made) rankings of the answers to one prompt.

An answer's score s is the scalar head's number at its last token. All functions take flat scores
[N] of any number of rankings, with a key that names the ranking of each; answers of different
rankings are never compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.config import RankingLossConfig
from shardwise.losses.contract import LossOutput
from shardwise.ops.attention import BRANCH_SHIFT
from shardwise.ops.logits import Logits, selected_values

ROUNDING = 64.0  # roundings that a gap may have come about by

# Shape suffixes: B rows, T tokens, N answers, P pairs of a better and a worse answer.


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Indices of every better and worse answer of one ranking, and 1 / pairs of that ranking."""

    better_P: Tensor
    worse_P: Tensor
    weight_P: Tensor  # float64, sums to the number of rankings


def all_pairs(rating_N: Tensor, key_N: Tensor) -> Pairs:
    """Pairs within equal keys whose ratings differ; each ranking weighs 1 in all.

    Ouyang et al. 2022, "Training language models to follow instructions", equation 1: all
    K (K - 1) / 2 pairs of a prompt in one batch element, divided by their number.
    """
    wins_NN, in_ranking_N = _wins(rating_N, key_N)
    better_P, worse_P = wins_NN.nonzero(as_tuple=True)
    return Pairs(better_P, worse_P, 1.0 / in_ranking_N[better_P])


def _wins(rating_N: Tensor, key_N: Tensor) -> tuple[Tensor, Tensor]:
    """Who is better than whom [N, N], and the number of pairs of each answer's ranking [N]."""
    same_NN = key_N[:, None] == key_N[None, :]
    wins_NN = same_NN & (rating_N[:, None] > rating_N[None, :])
    per_answer_N = wins_NN.sum(dim=1, dtype=torch.float64)
    return wins_NN, torch.where(same_NN, per_answer_N, 0.0).sum(dim=1)


def num_rankings(rating_N: Tensor, key_N: Tensor) -> Tensor:
    """How many rankings hold a pair (float64 scalar)."""
    wins_NN, in_ranking_N = _wins(rating_N, key_N)
    return (wins_NN.sum(dim=1) / in_ranking_N.clamp(min=1.0)).sum()


def pair_loss(
    score_N: Tensor, rating_N: Tensor, pairs: Pairs, margin: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d), d the better score less the worse and a margin.

    Bradley and Terry 1952; the margin of Touvron et al. 2023, "Llama 2", equation 2, here
    ``margin`` times the difference of the ratings; e is ``smoothing``.
    """
    rating_P = rating_N[pairs.better_P] - rating_N[pairs.worse_P]
    d_P = score_N[pairs.better_P] - score_N[pairs.worse_P] - margin * rating_P.to(score_N.dtype)
    return smoothed_logistic(d_P, smoothing)


def smoothed_logistic(d_P: Tensor, smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d): a preference that is false with chance e."""
    return -(1.0 - smoothing) * F.logsigmoid(d_P) - smoothing * F.logsigmoid(-d_P)


def plackett_luce(score_N: Tensor, rating_N: Tensor, key_N: Tensor) -> Tensor:
    """-log of the probability that an answer is taken first of itself and all worse ones [N].

    Plackett 1975; as a loss, Xia et al. 2008, "Listwise Approach to Learning to Rank", equation 6.
    Summed over a ranking it is -log of the whole order's probability; of two answers, the loss of
    their pair. Answers of equal rating are not compared.
    """
    same_NN = key_N[:, None] == key_N[None, :]
    rivals_NN = same_NN & (rating_N[:, None] > rating_N[None, :])
    rivals_NN = rivals_NN | torch.eye(len(score_N), dtype=torch.bool, device=score_N.device)
    table_NN = torch.where(rivals_NN, score_N[None, :].expand_as(rivals_NN), -torch.inf)
    return torch.logsumexp(table_NN, dim=1) - score_N


def centring(score_N: Tensor, pairs: Pairs) -> Tensor:
    """(s_better + s_worse)^2 a pair.

    Eisenstein et al. 2023, "Helping or Herding?", section 2.1: scores are known up to a constant
    for each prompt; this one chooses it.
    """
    return (score_N[pairs.better_P] + score_N[pairs.worse_P]).square()


def rights(d_P: Tensor, noise_P: Tensor) -> Tensor:
    """1 where a gap says the better answer is better, 0 where not, and 1/2 of a tie (float64).

    A tie is a gap within ``ROUNDING`` of ``noise_P``: the error of one rounding of what it is the
    difference of. Its sign would be another one in another order of the same sums.
    """
    is_tie_P = d_P.abs() <= ROUNDING * noise_P
    return torch.where(is_tie_P, 0.5, (d_P > 0).double())


def calibration_error(probability_P: Tensor, bins: int = 10) -> float:
    """Expected calibration error of sigmoid(d), the probability given to each true preference.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3: over bins of
    confidence max(p, 1 - p) in [0.5, 1], the gap between confidence and accuracy, weighted by
    size.
    """
    if not len(probability_P):
        return 0.0
    p_P = probability_P.double()
    confidence_P = torch.maximum(p_P, 1.0 - p_P)
    right_P = (p_P > 0.5).double() + 0.5 * (p_P == 0.5).double()
    index_P = ((confidence_P - 0.5) * 2.0 * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=p_P.device)
    gap.index_add_(0, index_P, confidence_P - right_P)
    return float(gap.abs().sum() / len(p_P))


class RankingLoss:
    """Rankings as rows of a tree (`data.groups`); ``loss_mask_BT`` marks each answer's last token.

    Reads ``extras["rating_BT"]`` there: higher is better. A ranking lies in one row, so that no
    cut of the batch parts its answers; its count is 1 if it holds a pair, else 0.
    """

    def __init__(self, config: RankingLossConfig) -> None:
        self.config = config
        self.weights: Mapping[str, float] = {"ranking": 1.0}
        if config.centring:
            self.weights = {"ranking": 1.0, "centring": config.centring}

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """Rankings with a pair; the same for every term."""
        return dict.fromkeys(self.weights, num_rankings(*ratings_and_keys(batch)))

    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """Sums over this micro-batch; metrics over its pairs and answers."""
        config = self.config
        score_BT = selected_values(logits_BTV, batch.loss_mask_BT)
        score_N = score_BT.flatten().index_select(0, batch.valid())
        rating_N, key_N = ratings_and_keys(batch)
        pairs = all_pairs(rating_N, key_N)
        weight_P = pairs.weight_P.to(score_N.dtype)
        sums = {}
        if config.objective == "pairs":
            loss_P = pair_loss(score_N, rating_N, pairs, config.margin, config.label_smoothing)
            sums["ranking"] = (loss_P * weight_P).sum()
        else:
            sums["ranking"] = plackett_luce(score_N, rating_N, key_N).sum()
        if config.centring:
            sums["centring"] = (centring(score_N, pairs) * weight_P).sum()
        return LossOutput(sums, _metrics(score_N.detach(), pairs))


def ratings_and_keys(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Ratings, and keys of rankings (a row and a document in it), of every valid token."""
    mask_BT = batch.loss_mask_BT
    row_BT = torch.arange(mask_BT.shape[0], device=mask_BT.device)[:, None].expand_as(mask_BT)
    key_BT = row_BT << BRANCH_SHIFT
    if batch.segment_ids_BT is not None:
        key_BT = key_BT + (batch.segment_ids_BT & ((1 << BRANCH_SHIFT) - 1))
    valid_N = batch.valid()
    return batch.extras["rating_BT"].flatten()[valid_N].double(), key_BT.flatten()[valid_N]


def _metrics(score_N: Tensor, pairs: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    d_P = (score_N[pairs.better_P] - score_N[pairs.worse_P]).double()
    number, answers = (score_N.new_full((), len(x), dtype=torch.float64) for x in (d_P, score_N))
    sizes_P = (score_N[pairs.better_P].abs() + score_N[pairs.worse_P].abs()).double()
    right_P = rights(d_P, torch.finfo(score_N.dtype).eps * sizes_P)
    return {
        "pair_accuracy": (right_P.sum(), number),
        "score_gap": (d_P.sum(), number),
        "score_mean": (score_N.double().sum(), answers),
    }


def measures(score_N: Tensor, rating_N: Tensor, key_N: Tensor, config: RankingLossConfig) -> Any:
    """Validation figures of many scores: loss, accuracy, calibration error, means."""
    pairs = all_pairs(rating_N, key_N)
    d_P = score_N[pairs.better_P] - score_N[pairs.worse_P]
    if config.objective == "pairs":
        loss_P = pair_loss(score_N, rating_N, pairs, config.margin, config.label_smoothing)
        total = (loss_P * pairs.weight_P).sum()
    else:
        total = plackett_luce(score_N, rating_N, key_N).sum()
    found = {k: float(a / b.clamp(min=1.0)) for k, (a, b) in _metrics(score_N, pairs).items()}
    return {
        "loss": float(total / pairs.weight_P.sum().clamp(min=1.0)),
        **found,
        "calibration_error": calibration_error(torch.sigmoid(d_P)),
    }
