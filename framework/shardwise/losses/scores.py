"""How a scalar head's numbers become the score of a completion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from shardwise.data.steps import step_ends
from shardwise.data.tokenizer import Tokenizer
from shardwise.losses.config import StepScoresConfig
from shardwise.losses.steps import aggregate


@dataclasses.dataclass(frozen=True)
class Score:
    """How a scalar head scores a completion: the tokens at which it is read, and their number."""

    read_at: Callable[[Sequence[int]], list[int]]
    total: Callable[[np.ndarray], float]


ANSWER_SCORE = Score(lambda tokens: [len(tokens) - 1], lambda scores: float(scores[0]))
ANSWER_CHANCE = Score(ANSWER_SCORE.read_at, lambda scores: aggregate(scores, "last"))


def score_of(config: StepScoresConfig | None, tokenizer: Tokenizer) -> Score:
    """A process reward model's, or (None) that of one that scores whole answers."""
    if config is None:
        return ANSWER_SCORE
    return Score(
        lambda tokens: step_ends(tokenizer, tokens, config.separator),
        lambda scores: aggregate(scores, config.aggregate),
    )
