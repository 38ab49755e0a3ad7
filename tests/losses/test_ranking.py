"""Ranking losses against the papers, in plain Python; no cut of a batch changes one."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from shardwise.data.batch import join
from shardwise.data.preferences import Ranking, collate_rankings
from shardwise.losses.config import RankingLossConfig
from shardwise.losses.ranking import (
    RankingLoss,
    all_pairs,
    calibration_error,
    centring,
    pair_loss,
    plackett_luce,
)

F64 = torch.float64
SCORES = torch.tensor([0.3, -1.2, 2.0, 0.1, 0.4, -0.7, 1.1], dtype=F64)
RATINGS = torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=F64)
KEYS = torch.tensor([0, 0, 0, 1, 1, 1, 2])  # the last ranking has one answer: nothing to compare


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_all_pairs_of_a_ranking_weigh_one_together() -> None:
    pairs = all_pairs(RATINGS, KEYS)
    found = {(int(a), int(b)) for a, b in zip(pairs.better_P, pairs.worse_P, strict=True)}
    assert found == {(0, 1), (0, 2), (1, 2), (3, 4), (3, 5)}
    torch.testing.assert_close(pairs.weight_P, torch.tensor([1 / 3] * 3 + [1 / 2] * 2, dtype=F64))


@pytest.mark.parametrize("margin,smoothing", [(0.0, 0.0), (0.7, 0.0), (0.0, 0.1), (0.5, 0.2)])
def test_pair_loss_is_the_papers(margin: float, smoothing: float) -> None:
    pairs = all_pairs(RATINGS, KEYS)
    expected = []
    for a, b in zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True):
        gap = float(SCORES[a] - SCORES[b]) - margin * float(RATINGS[a] - RATINGS[b])
        expected.append(-(1 - smoothing) * log_sigmoid(gap) - smoothing * log_sigmoid(-gap))
    found = pair_loss(SCORES, RATINGS, pairs, margin, smoothing)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64))


def test_plackett_luce_is_a_distribution_over_orders() -> None:
    """exp(-loss) of all orders adds up to 1, and of two answers is Bradley and Terry's."""
    scores, keys = SCORES[:3], torch.zeros(3, dtype=torch.int64)
    total = 0.0
    for order in permutations(range(3)):
        ratings = torch.tensor([float(-order.index(i)) for i in range(3)])
        total += math.exp(-float(plackett_luce(scores, ratings, keys).sum()))
    assert total == pytest.approx(1.0, abs=1e-12)
    two = plackett_luce(scores[:2], RATINGS[:2], keys[:2]).sum()
    assert float(two) == pytest.approx(-log_sigmoid(float(scores[0] - scores[1])))


def test_centring_and_calibration() -> None:
    pairs = all_pairs(RATINGS, KEYS)
    sums = centring(SCORES, pairs)
    assert float(sums[0]) == pytest.approx((0.3 - 1.2) ** 2)
    # 8 pairs at 0.75 of which 6 right, 2 at 0.95 of which 1 right: 0 and 0.45 off.
    p = torch.tensor([0.75] * 6 + [0.25] * 2 + [0.95, 0.05], dtype=F64)
    assert calibration_error(p) == pytest.approx(0.2 * abs(0.95 - 0.5), abs=1e-12)
    assert calibration_error(torch.zeros(0)) == 0.0


def rankings() -> list[Ranking]:
    g = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(5, 30, (n,), generator=g).tolist()

    lengths = [(4, [2, 3]), (2, [1, 5, 2]), (6, [3, 3, 1, 2]), (3, [2, 2]), (5, [4])]
    return [
        Ranking(ids(p), [ids(n) for n in answers], [float(r) for r in range(len(answers), 0, -1)])
        for p, answers in lengths
    ]


@pytest.mark.parametrize(
    "config",
    [
        RankingLossConfig(centring=0.1, margin=0.3, label_smoothing=0.1),
        RankingLossConfig(objective="plackett_luce"),
    ],
)
def test_no_cut_of_the_batch_changes_sums(config: RankingLossConfig) -> None:
    loss, made = RankingLoss(config), rankings()

    def head(batch: object) -> Tensor:
        ids = batch.input_ids_BT.double()  # type: ignore[attr-defined]
        return torch.sin(ids + 0.1 * batch.position_ids_BT)[..., None]  # type: ignore[attr-defined]

    def totals(cuts: list[list[int]], pad: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for rows in cuts:
            batch = collate_rankings(
                [made[i] for i in rows], rows, 0, num_real=len(rows), pad_multiple=pad
            )
            outputs = torch.where(batch.loss_mask_BT[..., None], head(batch), torch.nan)
            out = loss(outputs, batch)
            parts = {**out.sums, **{f"n {k}": v for k, v in loss.counts(batch).items()}}
            parts |= {f"m {k}": v[0] for k, v in out.metrics.items()}
            for name, value in parts.items():
                found[name] = found.get(name, 0.0) + float(value)
        return found

    whole = totals([[0, 1, 2, 3, 4]], 1)
    assert whole["n ranking"] == 4  # one answer alone is no ranking
    for cuts, pad in (([[0], [1], [2], [3], [4]], 16), ([[4, 2], [1, 0, 3]], 7)):
        assert totals(cuts, pad) == pytest.approx(whole, rel=1e-12)


def test_scores_are_read_where_the_end_token_is_the_input() -> None:
    """By lengths, not by pad ids: the pad id may be a word (traps 3 and 8)."""
    one = Ranking([7, 8], [[0, 9], [9, 9, 9]], [1.0, 0.0])
    batch = collate_rankings([one], [0], pad_id=9, num_real=1, pad_multiple=1)
    ids = batch.input_ids_BT[0].tolist()
    assert ids == [7, 8, 0, 9, 8, 9, 9, 9]
    assert batch.loss_mask_BT[0].nonzero().flatten().tolist() == [3, 7]
    assert batch.extras["rating_BT"][0, [3, 7]].tolist() == [1.0, 0.0]
    twice = join([batch, batch])
    assert float(RankingLoss(RankingLossConfig()).counts(twice)["ranking"]) == 2


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="objective: pairs"):
        RankingLossConfig(objective="plackett_luce", margin=1.0)
