"""A world of known answers: steps of one letter each, an engine that draws them, their true values.

An answer is `depth` letters, a line each; the last one ends the text. Nothing here is a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from shardwise.errors import UserError
from shardwise.ops import rng
from shardwise.rewards import Problem
from shardwise.rollout.config import Sampling
from shardwise.rollout.engine import Progress, RolloutCounts
from shardwise.rollout.sequences import Completion, Request
from shardwise.search.config import StepsConfig
from shardwise.search.driver import Policy
from shardwise.search.driver import search as run_search
from shardwise.search.scorers import Path
from shardwise.search.tree import Tree

LETTERS = "abcdef"
LINE, END, PROMPT = 10, 11, 12


def decode(ids: Sequence[int]) -> str:
    """Letters, lines and the end."""
    return "".join("\n" if t == LINE else "<end>" if t == END else LETTERS[t] for t in ids)


@dataclasses.dataclass
class _Sequence:
    prompt: list[int]
    name: tuple[int, int, int]  # key, prompt id, sample id
    sampling: Sampling
    hold: bool
    forked: bool = False
    tokens: list[int] = dataclasses.field(default_factory=list)


class FakeEngine:
    """A `RolloutEngine`; ``slots``: sequences that get a token in a step."""

    checksum = "fake"

    def __init__(self, depth: int = 3, width: int = 3, slots: int = 1000) -> None:
        self.depth, self.width, self.slots = depth, width, slots
        self.counts = RolloutCounts()
        self.flying: dict[int, _Sequence] = {}
        self.held: dict[int, _Sequence] = {}
        self.most_spent = self._next = 0  # sequences that are held, and were forked before

    def update_weights(self, weights: Any, *, hf_names: bool = True) -> str:
        return self.checksum

    def submit(
        self, request: Request, sampling: Sampling, key: int = 0, *, hold: bool = False, **_: Any
    ) -> list[int]:
        self.counts.computed += len(request.prompt_tokens)
        self.counts.shared += (request.num_samples - 1) * len(request.prompt_tokens)
        return self._add([], request, sampling, key, hold)

    def fork(
        self,
        sequence: int,
        request: Request,
        sampling: Sampling,
        key: int = 0,
        *,
        hold: bool = False,
        **_: Any,
    ) -> list[int]:
        if sequence not in self.held:
            raise UserError(f"sequence {sequence} is not held")
        source = self.held[sequence]
        source.forked = True
        before = [*source.prompt, *source.tokens]
        self.counts.computed += 1
        self.counts.shared += request.num_samples * len(before) - 1
        return self._add(before, request, sampling, key, hold)

    def _add(
        self, before: list[int], request: Request, sampling: Sampling, key: int, hold: bool
    ) -> list[int]:
        numbers = list(range(self._next, self._next + request.num_samples))
        self._next += len(numbers)
        for i, n in enumerate(numbers):
            prompt = [*before, *request.prompt_tokens]
            name = (key, request.prompt_id, request.first_sample_id + i)
            self.flying[n] = _Sequence(prompt, name, sampling, hold)
        return numbers

    def step(self) -> list[Progress]:
        self.most_spent = max(self.most_spent, sum(s.forked for s in self.held.values()))
        return [self._one(n, self.flying[n]) for n in list(self.flying)[: self.slots]]

    def _one(self, number: int, s: _Sequence) -> Progress:
        written = [*s.prompt[s.prompt.index(PROMPT) + 1 :], *s.tokens]
        letters = [t for t in written if t < LINE]
        if written and written[-1] < LINE:
            token = END if len(letters) == self.depth else LINE
        else:
            token = rng.key(0, *s.name, len(s.tokens)) % self.width
        s.tokens.append(token)
        self.counts.drawn += 1
        self.counts.computed += len(s.tokens) > 1
        stopped = token in s.sampling.stop_ids
        stopped |= any(t in decode(s.tokens) for t in s.sampling.stop_strings)
        if not stopped and len(s.tokens) < s.sampling.max_new_tokens:
            return Progress(number, [token], None, [-1.0 - token / 10])
        del self.flying[number]
        if s.hold:
            self.held[number] = s
        logprobs = [-1.0 - t / 10 for t in s.tokens]
        _, prompt_id, sample_id = s.name
        done = Completion(
            prompt_id, sample_id, tuple(s.prompt), list(s.tokens), logprobs, logprobs,
            "stop" if stopped else "length",
        )  # fmt: skip
        return Progress(number, [token], done, logprobs[-1:])

    def release(self, sequence: int) -> None:
        self.held.pop(sequence, None)
        self.flying.pop(sequence, None)


def tree(number: int = 0) -> Tree:
    """A problem whose true answer is ``b`` in every step."""
    problem = Problem(f"p{number}", f"question {number}", "b b b", {"n": number})
    prompt = [{"role": "user", "content": problem.question}]
    return Tree(problem, number, prompt, [PROMPT] * (1 + number % 3))


def share_right(path: Path) -> float:
    """The share of the letters so far that are b."""
    letters = [c for c in path.text if c in LETTERS]
    return sum(c == "b" for c in letters) / max(len(letters), 1)


class FakeScorer:
    """Scores paths by a function; counts calls."""

    name, reads = "fake", True

    def __init__(
        self, value: Callable[[Path], float | None] = share_right, samples: int = 0
    ) -> None:
        self.value, self.samples, self.calls = value, samples, 0

    def __call__(self, paths: Sequence[Path]) -> list[float | None]:
        self.calls += 1
        return [self.value(p) for p in paths]


def policy(max_new_tokens: int = 100, **steps: Any) -> Policy:
    """Of the fake engine."""
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_ids=(END,))
    return Policy(sampling, StepsConfig(**steps), 1000, decode)


def search(
    config: Any,
    *,
    trees: Sequence[Tree] | None = None,
    engine: FakeEngine | None = None,
    scorer: FakeScorer | None = None,
    **options: Any,
) -> list[Tree]:
    """Search, and check that the engine is left as it was."""
    engine = engine or FakeEngine()
    how = options.pop("policy", None) or policy()
    scorer = FakeScorer() if scorer is None else scorer
    found = run_search(engine, how, config, scorer, [tree()] if trees is None else trees, **options)
    assert not engine.held and not engine.flying
    return found
