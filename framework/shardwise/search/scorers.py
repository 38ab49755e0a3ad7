"""What scores paths of a search: the verifier, rollouts, and how many say the same.

Models that score are in `scoring_models`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from shardwise import rewards
from shardwise.rewards import Problem, RewardItem
from shardwise.rewards.rules import Rules, Style, obeys
from shardwise.rewards.verifiers import Extract
from shardwise.search.choose import said


class Path(NamedTuple):
    """An answer up to some node. ``finished``: it ended by itself; ``text``: without stop tokens.

    ``prompt_id``: paths of one problem have the same.
    """

    problem: Problem
    prompt_id: int
    prompt_tokens: Sequence[int]
    token_ids: Sequence[int]
    text: str
    finished: bool


class Scorer(Protocol):
    """Scores paths in a batch; of what else is in the batch, other problems change nothing.

    ``samples``: answers to be drawn from a path that is not at its end, whose mean score is the
    path's; 0: it scores paths as they are. ``reads``: whether a model reads the tokens.
    """

    name: str
    samples: int
    reads: bool

    def __call__(self, paths: Sequence[Path]) -> list[float | None]:
        """One score a path; None: unscorable."""
        ...


class Verifier:
    """The reward of answers, against the truth. One without an end is judged as it stands.

    ``samples``: see `Scorer`; with any, scores are called ``rollouts``.
    """

    reads = False

    def __init__(self, scorer: rewards.Scorer, samples: int = 0) -> None:
        self.scorer, self.samples = scorer, samples
        self.name = "rollouts" if samples else "verifier"

    def __call__(self, paths: Sequence[Path]) -> list[float | None]:
        """See `Scorer`."""
        return [result.value for result in self.scorer.score([item_of(p) for p in paths])]


def item_of(path: Path) -> RewardItem:
    """What a verifier is told of a path."""
    _, question, answer, meta, _, others = path.problem
    return RewardItem(question, path.text, answer, meta, len(path.token_ids), others)


class ByRules:
    """1 for a path that keeps to the rules of a task, from its question alone; else 0."""

    name, samples, reads = "rules", 0, False

    def __init__(self, rules: Rules, style: Style) -> None:
        self.rules, self.style = rules, style

    def __call__(self, paths: Sequence[Path]) -> list[float | None]:
        """See `Scorer`."""
        return [
            float(obeys(self.rules, self.style, p.problem.question, p.text, p.finished))
            for p in paths
        ]


class SelfConsistency:
    """The share of a problem's paths that say the same; None for one that says nothing."""

    name, samples, reads = "self_consistency", 0, False

    def __init__(self, extract: Extract) -> None:
        self.extract = extract

    def __call__(self, paths: Sequence[Path]) -> list[float | None]:
        """See `Scorer`; all of a problem's answers must be in one call."""
        answers = [(p.prompt_id, said(p.text, self.extract)) for p in paths]
        counts: Mapping[Any, int] = Counter(answers)
        number = Counter(prompt_id for prompt_id, _ in answers)
        return [None if a[1] is None else counts[a] / number[a[0]] for a in answers]


def mean_score(scores: Sequence[float | None]) -> float | None:
    """The mean of those that there are; None without any."""
    known = [s for s in scores if s is not None]
    return sum(known) / len(known) if known else None
