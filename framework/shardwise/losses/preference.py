"""Preference losses: an answer that is better than another, or that is good or bad by itself.

Let y+ be the better answer, y- the worse, r(y) = log p(y|x) - log p_ref(y|x) summed over the tokens
of the answer, its end token included and the prompt's not, and d = r(y+) - r(y-). `PreferenceLoss`
puts these functions under the loss contract: a ranking (pair) counts once, KTO's answers each once,
over the global batch. Of rankings with more than two answers all pairs are taken, each weighing
1 / pairs, as `losses.ranking` does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.aggregate import first_valid
from shardwise.losses.contract import LossOutput, reads_valid
from shardwise.losses.logprobs import valid_logprobs
from shardwise.losses.policy import extra
from shardwise.losses.preference_config import Divergence, KtoConfig, PreferenceConfig
from shardwise.losses.ranking import (
    all_pairs,
    num_rankings,
    ratings_and_keys,
    rights,
    smoothed_logistic,
)
from shardwise.ops.logits import Logits

# Shape suffixes: B rows, T tokens, M valid tokens, N answers, P pairs.

_MAX_EXPONENT = 80.0  # e^80 is 5e34: fp32 ends at 3e38

Metrics = dict[str, tuple[Tensor, Tensor]]


# --- formulas -----------------------------------------------------------------------------------


def divergence_score(kind: Divergence, ratio: Tensor, order: float | None = None) -> Tensor:
    """f'(p / p_ref) up to a constant, of the log-ratio: what f-DPO compares instead of it.

    Wang et al. 2023, "Beyond Reverse KL", table 1. ``order``: alpha's; towards 1 it is reverse_kl,
    towards 0 forward_kl.
    """
    if kind == "reverse_kl" or (kind == "alpha" and order == 1.0):
        return ratio
    if kind == "forward_kl":
        return -torch.expm1((-ratio).clamp(max=_MAX_EXPONENT))
    if kind == "js":
        return math.log(2.0) + F.logsigmoid(ratio)
    assert order is not None
    return torch.expm1(((order - 1.0) * ratio).clamp(max=_MAX_EXPONENT)) / (order - 1.0)


def robust(d: Tensor, flipped: float) -> Tensor:
    """((1 - e) L(d) - e L(-d)) / (1 - 2e), L the logistic loss: unbiased under flipped labels.

    Chowdhury et al. 2024, "Provably Robust DPO", equation 12.
    """
    clean, other = F.logsigmoid(d), F.logsigmoid(-d)
    return -((1.0 - flipped) * clean - flipped * other) / (1.0 - 2.0 * flipped)


def ipo(d: Tensor, tau: float) -> Tensor:
    """(d - 1 / (2 tau))^2; Azar et al. 2023, "A General Theoretical Paradigm", equation 17.

    ``d`` is of log-ratios averaged over the tokens of each answer.
    """
    return (d - 0.5 / tau).square()


def hinge(d: Tensor, margin: float = 1.0) -> Tensor:
    """max(0, margin - d).

    With log-probabilities for d and -log p(y+) beside it: SLiC-HF, Zhao et al. 2023, equation 1.
    """
    return torch.relu(margin - d)


def exo(d: Tensor, flipped: float) -> Tensor:
    """KL((sigmoid(d), sigmoid(-d)) || (1 - e, e)).

    Ji et al. 2024, "Towards Efficient Exact Optimization", equation 16, of two answers.
    """
    better, worse = F.logsigmoid(d), F.logsigmoid(-d)
    return better.exp() * (better - math.log1p(-flipped)) + worse.exp() * (
        worse - math.log(flipped)
    )


def discopop(d: Tensor, tau: float) -> Tensor:
    """Logistic loss where d / tau is low, exponential where it is high, blended by its sigmoid.

    Lu et al. 2024, "Discovering Preference Optimization Algorithms", equation 5.
    """
    share = torch.sigmoid(d / tau)
    return -F.logsigmoid(d) * (1.0 - share) + (-d).clamp(max=_MAX_EXPONENT).exp() * share


def apo_zero(chosen: Tensor, rejected: Tensor) -> Tensor:
    """sigmoid(-r+) + sigmoid(r-), of scaled log-ratios: chosen up, rejected down.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization", equation 7, up to a constant.
    """
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(chosen: Tensor, rejected: Tensor) -> Tensor:
    """sigmoid(r+) + sigmoid(r- - r+): both down, the rejected more. The same, equation 8."""
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid of the log of the odds ratio, of log-probabilities averaged over tokens.

    odds(p) = p / (1 - p); Hong et al. 2024, "ORPO", equations 4 and 7.
    """
    return -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    # A certain answer has infinite odds: fp32's last step before it.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def kto(ratio: Tensor, desirable: Tensor, baseline: Tensor, config: KtoConfig) -> Tensor:
    """w (1 - sigmoid(beta (r - z))) of desirable answers, w (1 - sigmoid(beta (z - r))) of others.

    Ethayarajh et al. 2024, "KTO", equation 8, up to a constant. z is the policy's KL from the
    reference, estimated from mismatched answers over the global batch, not below 0, without
    gradient.
    """
    gain = config.beta * (ratio - baseline.detach())
    good, bad = config.desirable_weight, config.undesirable_weight
    return torch.where(desirable, good * torch.sigmoid(-gain), bad * torch.sigmoid(gain))


# --- answers and pairs --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answers:
    """The valid tokens of N answers, flat and answer by answer, and what is known of each."""

    logp_M: Tensor
    ref_M: Tensor | None  # None: no reference
    answer_M: Tensor  # int64: which answer a token is of
    rating_N: Tensor  # float64, higher is better
    key_N: Tensor  # int64, equal within a ranking
    baseline_N: Tensor | None = None  # KTO's

    @property
    def ratios(self) -> Tensor:
        """log p - log p_ref a token [M]; without a reference log p."""
        return self.logp_M if self.ref_M is None else self.logp_M - self.ref_M

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer [N], in the dtype of log p."""
        return self.sum(torch.ones_like(self.logp_M))

    def sum(self, x_M: Tensor) -> Tensor:
        """Over the tokens of each answer [N]."""
        return x_M.new_zeros(len(self.rating_N)).index_add(0, self.answer_M, x_M)

    def best(self) -> Tensor:
        """Answers that none of their ranking is better than, and some are worse ([N], bool)."""
        same_NN = self.key_N[:, None] == self.key_N[None, :]
        above_NN = same_NN & (self.rating_N[None, :] > self.rating_N[:, None])
        return ~above_NN.any(dim=1) & above_NN.any(dim=0)


def answers_of(batch: MicroBatch, logp_BT: Tensor, config: PreferenceConfig) -> Answers:
    """The answers of a micro-batch; ``logp_BT`` of its valid tokens."""
    valid_M = batch.valid()
    first_M = first_valid(batch.loss_mask_BT, batch.segment_ids_BT).flatten()[valid_M]
    rating_M, key_M = ratings_and_keys(batch)

    def told(name: str) -> Tensor | None:
        if name not in batch.extras:
            return None
        return extra(batch, name, logp_BT).flatten()[valid_M]

    baseline_M = told("baseline_BT")
    if not config.paired and baseline_M is None:
        raise ValueError("kto needs extras['baseline_BT']")
    return Answers(
        logp_BT.flatten()[valid_M],
        told("ref_logprobs_BT"),
        first_M.cumsum(0) - 1,
        rating_M[first_M],
        key_M[first_M],
        None if baseline_M is None else baseline_M[first_M],
    )


@dataclasses.dataclass(frozen=True)
class _Compared:
    """Of every pair, better answers first: log-ratios, log-probabilities a token, tokens."""

    ratios: tuple[Tensor, Tensor]
    means: tuple[Tensor, Tensor]
    logps: tuple[Tensor, Tensor]
    lengths: tuple[Tensor, Tensor]


def _compare(answers: Answers, sides: tuple[Tensor, Tensor], ld_alpha: float | None) -> _Compared:
    better_P, worse_P = sides

    def both(x_N: Tensor) -> tuple[Tensor, Tensor]:
        return x_N[better_P], x_N[worse_P]

    length_N, logp_N = answers.lengths, answers.sum(answers.logp_M)
    ratios = both(answers.sum(answers.ratios))
    if ld_alpha is not None:
        ratios = _desensitised(answers, sides, ratios, ld_alpha)
    return _Compared(ratios, both(logp_N / length_N), both(logp_N), both(length_N))


def _desensitised(
    answers: Answers, sides: tuple[Tensor, Tensor], ratios: tuple[Tensor, Tensor], alpha: float
) -> tuple[Tensor, Tensor]:
    """Log-ratios in which tokens beyond the length of the pair's shorter answer weigh ``alpha``.

    Liu et al. 2024, "Length Desensitization in DPO", equation 8.
    """
    length_N = answers.lengths.long()
    start_N = length_N.cumsum(0) - length_N
    width = int(length_N.max()) if len(length_N) else 0
    place_M = torch.arange(len(answers.answer_M), device=length_N.device)
    place_M = place_M - start_N[answers.answer_M]
    table_NT = answers.ratios.new_zeros(len(length_N), width)
    prefix_NT = table_NT.index_put((answers.answer_M, place_M), answers.ratios).cumsum(dim=1)
    shared_P = torch.minimum(length_N[sides[0]], length_N[sides[1]])
    first, second = (prefix_NT[side_P, shared_P - 1] for side_P in sides)
    parts = zip((first, second), ratios, strict=True)
    chosen, rejected = (shared + alpha * (whole - shared) for shared, whole in parts)
    return chosen, rejected


def _delta(config: Any, pair: _Compared) -> Tensor:
    """d of the kinds that look at nothing else: scaled, under its divergence, perhaps a token."""
    chosen, rejected = (
        divergence_score(config.divergence, r, config.divergence_alpha) for r in pair.ratios
    )
    if config.kind == "ipo" or getattr(config, "length_normalised", False):
        chosen, rejected = chosen / pair.lengths[0], rejected / pair.lengths[1]
    return chosen - rejected


def _scaled(config: Any, parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return config.beta * parts[0], config.beta * parts[1]


def _simpo(config: Any, pair: _Compared) -> Tensor:
    """Logistic of beta times the gap a token, less a margin: Meng et al. 2024, "SimPO", eq. 6."""
    chosen, rejected = _scaled(config, pair.means)
    return smoothed_logistic(chosen - rejected - config.margin, config.label_smoothing)


def _cpo(config: Any, pair: _Compared) -> Tensor:
    """DPO with a uniform reference: Xu et al. 2024, "Contrastive Preference Optimization"."""
    chosen, rejected = _scaled(config, pair.logps)
    return smoothed_logistic(chosen - rejected, config.label_smoothing)


# The loss of each pair, by kind.
_LOSSES: dict[str, Callable[[Any, _Compared], Tensor]] = {
    "sigmoid": lambda c, pair: smoothed_logistic(c.beta * _delta(c, pair), c.label_smoothing),
    "robust": lambda c, pair: robust(c.beta * _delta(c, pair), c.label_smoothing),
    "ipo": lambda c, pair: ipo(_delta(c, pair), c.beta),
    "hinge": lambda c, pair: hinge(c.beta * _delta(c, pair)),
    "exo": lambda c, pair: exo(c.beta * _delta(c, pair), c.label_smoothing),
    "discopop": lambda c, pair: discopop(c.beta * _delta(c, pair), c.tau),
    "apo_zero": lambda c, pair: apo_zero(*_scaled(c, pair.ratios)),
    "apo_down": lambda c, pair: apo_down(*_scaled(c, pair.ratios)),
    "slic": lambda c, pair: hinge(pair.logps[0] - pair.logps[1], c.margin),
    "simpo": _simpo,
    "orpo": lambda c, pair: c.beta * odds_ratio(*pair.means),
    "cpo": _cpo,
}


# --- under the loss contract --------------------------------------------------------------------


class PreferenceLoss:
    """Rankings as rows of a tree (`data.groups`); ``loss_mask_BT`` marks the answers' tokens.

    Reads from ``batch.extras``, at valid positions: ``rating_BT`` (higher is better; for KTO 1 is
    desirable, 0 is not), with a reference ``ref_logprobs_BT``, for KTO ``baseline_BT``. A ranking
    lies in one row, so that no cut of the batch parts its answers.

    Terms: ``preference``, a count a ranking that holds a pair (KTO: an answer); and ``sft``, -log p
    of the best answers. Metrics: rewards (beta times the log-ratio, or log-probability a token),
    their margin and accuracy, log-probabilities of both sides and the share of pairs that they
    order rightly (ranking accuracy: Chen et al. 2024, arXiv 2405.19534), and with a reference their
    drift from it in nats.
    """

    def __init__(self, config: PreferenceConfig, with_reference: bool = True) -> None:
        self.config, self.with_reference = config, with_reference
        self.weights: Mapping[str, float] = {"preference": 1.0}
        if weight := getattr(config, "sft_weight", 0.0):
            self.weights = {"preference": 1.0, "sft": weight}

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """See the class."""
        return self.counts_of(answers_of(batch, batch.extras["rating_BT"], self.config))

    @reads_valid
    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """Sums over this micro-batch; metrics over its pairs (KTO: its answers)."""
        if self.with_reference and "ref_logprobs_BT" not in batch.extras:
            raise ValueError("this loss needs extras['ref_logprobs_BT']")
        return self.of(answers_of(batch, valid_logprobs(logits_BTV, batch), self.config))

    def counts_of(self, answers: Answers) -> Mapping[str, Tensor]:
        """Counts of the terms over these answers; their log-probabilities do not matter."""
        if not self.config.paired:
            number = answers.rating_N.new_full((), len(answers.rating_N))
            return {"preference": number}
        counts = {"preference": num_rankings(answers.rating_N, answers.key_N)}
        if "sft" in self.weights:
            counts["sft"] = self._sft(answers, answers.logp_M.detach().double())[1]
        return counts

    def of(self, answers: Answers) -> LossOutput:
        """Sums and metrics over these answers."""
        if not self.config.paired:
            return self._unpaired(answers)
        pairs = all_pairs(answers.rating_N, answers.key_N)
        sides = pairs.better_P, pairs.worse_P
        pair = _compare(answers, sides, getattr(self.config, "ld_alpha", None))
        loss_P = _LOSSES[self.config.kind](self.config, pair)
        sums = {"preference": (loss_P * pairs.weight_P.to(loss_P.dtype)).sum()}
        if "sft" in self.weights:
            sums["sft"] = self._sft(answers, answers.logp_M)[0]
        return LossOutput(sums, self._metrics(answers, pair))

    def _sft(self, answers: Answers, logp_M: Tensor) -> tuple[Tensor, Tensor]:
        """-log p of the best answers as a sum, and its count, by ``sft_aggregation``."""
        best_N, length_N = answers.best(), answers.lengths
        how = getattr(self.config, "sft_aggregation", "token_mean")
        loss_N = torch.where(best_N, -answers.sum(logp_M), 0.0)
        if how == "seq_mean_token_mean":
            loss_N = loss_N / length_N
        number_N = length_N.double() if how == "token_mean" else torch.ones_like(answers.rating_N)
        return loss_N.sum(), torch.where(best_N, number_N, 0.0).sum()

    def _unpaired(self, answers: Answers) -> LossOutput:
        assert isinstance(self.config, KtoConfig) and answers.baseline_N is not None
        ratio_N, good_N = answers.sum(answers.ratios), answers.rating_N > 0.5
        loss_N = kto(ratio_N, good_N, answers.baseline_N, self.config)
        reward_N = self.config.scale * ratio_N.detach()
        figures = {"rewards": reward_N, "logps": answers.sum(answers.logp_M.detach())}
        if answers.ref_M is not None:
            figures["drift"] = ratio_N.detach()
        metrics: Metrics = {}
        for side, chosen_N in (("chosen", good_N), ("rejected", ~good_N)):
            number = chosen_N.sum(dtype=torch.float64)
            for name, value_N in figures.items():
                total = torch.where(chosen_N, value_N.double(), 0.0).sum()
                metrics[f"{name}_{side}"] = (total, number)
        number = ratio_N.new_full((), len(ratio_N), dtype=torch.float64)
        metrics["kl_baseline"] = (answers.baseline_N.double().sum(), number)
        return LossOutput({"preference": loss_N.sum()}, metrics)

    def _metrics(self, answers: Answers, pair: _Compared) -> Metrics:
        a_token = not self.config.with_reference and self.config.kind in ("simpo", "orpo")
        scores = pair.means if a_token else pair.ratios
        chosen, rejected = (self.config.scale * s.detach().double() for s in scores)
        number = chosen.new_full((), len(chosen))
        # Of a policy that is its reference, gaps are rounding errors of what they are taken from.
        ours, theirs = (s.detach().abs() for s in (pair.means if a_token else pair.logps))
        noise_P = self.config.scale * torch.finfo(ours.dtype).eps * (ours + theirs)
        logps = [s.detach() for s in pair.logps]
        error_P = torch.finfo(logps[0].dtype).eps * (logps[0].abs() + logps[1].abs())
        figures = {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "margin": chosen - rejected,
            "pair_accuracy": rights(chosen - rejected, noise_P),
            "ranking_accuracy": rights(logps[0].double() - logps[1].double(), error_P),
        }
        told = {"logps": pair.logps} | ({} if answers.ref_M is None else {"drift": pair.ratios})
        for name, sides in told.items():
            for side, value_P in zip(("chosen", "rejected"), sides, strict=True):
                figures[f"{name}_{side}"] = value_P.detach().double()
        return {name: (value_P.sum(), number) for name, value_P in figures.items()}
