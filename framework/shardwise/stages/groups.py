"""A problem's completions: the row that is learnt from, and what all ranks know of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from shardwise.rewards import Problem


@dataclasses.dataclass
class Group:
    """A problem with its completions; the lists below run in parallel, one entry a completion.

    All ranks know what became of them; the row itself (prompt, tokens, log-probabilities, texts and
    the words that were left) is empty on a rank that does not need it, which knows its ``sizes``.
    """

    problem: Problem
    prompt_id: int
    prompt: list[int]
    tokens: list[list[int]]
    logprobs: list[list[float]]  # of what was sampled from: with filters, of what they left
    stopped: list[bool]
    texts: list[str]
    rewards: list[float | None]  # None: unscorable
    policy: str  # checksum of the weights that wrote it
    # By name, for each completion a number or one a token; what a loss reads of them.
    per_token: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    reasons: list[str] = dataclasses.field(default_factory=list)  # why unscorable; "": it is not
    kept: list[list[list[int]]] | None = None  # the words that filters left of each token's
    elsewhere: list[int] | None = None  # its sizes, where others alone hold the row

    @property
    def here(self) -> bool:
        """Whether this rank holds the row."""
        return self.elsewhere is None

    @property
    def sizes(self) -> list[int]:
        """Tokens of the prompt, and of each completion."""
        if self.elsewhere is not None:
            return self.elsewhere
        return [len(self.prompt), *map(len, self.tokens)]

    @property
    def num_row_tokens(self) -> int:
        """Tokens in its training row."""
        return sum(self.sizes) - 1

    def statistics(self) -> dict[str, Any]:
        """What all ranks are told of it, as plain JSON."""
        return {
            "elsewhere": self.sizes,
            "stopped": self.stopped,
            "rewards": self.rewards,
            "reasons": self.reasons,
            "policy": self.policy,
        }

    @classmethod
    def told(cls, problem: Problem, prompt_id: int, statistics: Mapping[str, Any]) -> Group:
        """A group of which these `statistics` are known."""
        return cls(problem, prompt_id, [], [], [], texts=[], **statistics)

    def packed(self) -> Tensor:
        """Its row as an int32 tensor, which another rank may `unpack`."""
        kept = [words for of_completion in self.kept or () for words in of_completion]
        parts: list[Any] = [
            [self.kept is not None],
            self.prompt,
            *self.tokens,
            np.asarray(list(itertools.chain(*self.logprobs)), dtype=np.float64).view(np.int32),
            list(map(len, kept)),
            *kept,
        ]
        return torch.from_numpy(np.concatenate([np.asarray(p, dtype=np.int32) for p in parts]))

    def unpack(self, packed: Tensor, text_of: Callable[[list[int]], str]) -> None:
        """Hold a row that was `packed`, its texts decoded."""
        [first, *lengths], flat, at = self.sizes, packed.numpy(), 1

        def take(size: int) -> np.ndarray:
            nonlocal at
            at += size
            return flat[at - size : at]

        self.prompt = take(first).tolist()
        self.tokens = [take(n).tolist() for n in lengths]
        # Another tensor's end may stand before it, at an odd place.
        logprobs = iter(take(2 * sum(lengths)).copy().view(np.float64).tolist())
        self.logprobs = [list(itertools.islice(logprobs, n)) for n in lengths]
        if flat[0]:
            counts = iter(take(sum(lengths)).tolist())
            self.kept = [[take(next(counts)).tolist() for _ in range(n)] for n in lengths]
        self.texts = [text_of(tokens) for tokens in self.tokens]
        self.elsewhere = None

    def numbers(self) -> list[float]:
        """All that was written and paid, as numbers: equal for equal groups alone."""
        text = xxhash.xxh32_intdigest(repr([self.problem.id, self.texts, self.reasons]).encode())
        rewards = [math.nan if r is None else r for r in self.rewards]
        flat = [self.prompt_id, text, *self.prompt, *itertools.chain(*self.tokens), *self.stopped]
        flat += np.nan_to_num(np.asarray(rewards, dtype=float), nan=-1e6).tolist()
        return [float(v) for v in flat]

    def unscored(self) -> list[str]:
        """Why completions have no reward; "" for those that have one."""
        reasons = self.reasons or [""] * len(self.rewards)
        return [
            "" if reward is not None else reason or "it was left out"
            for reward, reason in zip(self.rewards, reasons, strict=True)
        ]

    def records(self, step: int) -> list[dict[str, Any]]:
        """One JSON record a completion; ``mask``: which tokens carry loss (none, if unscorable)."""
        reasons = self.unscored()
        return [
            {
                "step": step,
                "prompt_id": self.prompt_id,
                "sample_id": i,
                "policy": self.policy,
                "problem": self.problem.id,
                "question": self.problem.question,
                "answer": self.problem.answer,
                "prompt_tokens": self.prompt,
                "tokens": self.tokens[i],
                "logprobs": self.logprobs[i],
                "mask": [self.rewards[i] is not None] * len(self.tokens[i]),
                "text": self.texts[i],
                "stopped": self.stopped[i],
                "reward": self.rewards[i],
                **({"reason": reasons[i]} if reasons[i] else {}),
                **({"kept": self.kept[i]} if self.kept else {}),
                **{_short(name): _plain(values[i]) for name, values in self.per_token.items()},
            }
            for i in range(len(self.tokens))
        ]


def _short(name: str) -> str:
    """A name in a record: ``advantage`` for ``advantages_BT``."""
    return name.removesuffix("_BT").removesuffix("s")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
