"""Verifiable problems in three splits that are disjoint by construction.

The split of a problem is a hash of its question alone, so no question can be in two splits,
whatever the seed, the number of problems or the order in which they are asked for; and because
the hash knows nothing of difficulty, the splits are equally hard. Splits are also free of
duplicates.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, overload

import xxhash
from pydantic import Field, model_validator

from shardwise.config.schema import Section, Seed
from shardwise.errors import ConfigError
from shardwise.rewards import reasoning
from shardwise.rewards.families import FAMILIES, Operation, Problem, stream

Split = Literal["train_sft", "train_rl", "held_out"]
# Which tenths of the hash space a split owns.
_TENTHS: dict[Split, range] = {
    "held_out": range(0, 2),
    "train_sft": range(2, 5),
    "train_rl": range(5, 10),
}
_PATIENCE = 20_000  # candidates in a row without a new problem: the family is exhausted


class TaskConfig(Section):
    """A source of problems and how they are written."""

    kind: Literal["count_letters", "arithmetic", "reasoning_gym"] = Field(
        "count_letters", description="which problems"
    )
    seed: Seed = Field(0, description="of the problems")
    style: Literal["answer", "steps", "tags"] = Field(
        "answer",
        description="answer: the bare answer; steps: steps, then 'Answer: x'; "
        "tags: <think>steps</think><answer>x</answer>",
    )
    system: str | None = Field(
        None, description="system message of every conversation", examples=["Answer with a number."]
    )
    min_length: Annotated[int, Field(ge=1, le=100_000)] = Field(
        6, description="count_letters: fewest letters"
    )
    max_length: Annotated[int, Field(ge=1, le=100_000)] = Field(
        14, description="count_letters: most letters"
    )
    letters: str = Field("abc", min_length=1, description="count_letters: the alphabet")
    targets: str = Field(
        "", description="count_letters: letters asked for; empty: the alphabet", examples=["a"]
    )
    operations: tuple[Operation, ...] = Field(
        ("add", "subtract", "multiply", "compare", "chain"),
        min_length=1,
        description="arithmetic: drawn uniformly",
    )
    min_digits: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="arithmetic: digits of the shortest operand"
    )
    max_digits: Annotated[int, Field(ge=1, le=1000)] = Field(
        2, description="arithmetic: digits of the longest operand"
    )
    chain_length: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="arithmetic: operations of a chain"
    )
    name: str = Field(
        "", description="reasoning_gym: name of the dataset", examples=["letter_counting"]
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="reasoning_gym: settings of the dataset",
        examples=[{"max_words": 8}],
    )

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        if self.min_length > self.max_length:
            raise ValueError("min_length must not exceed max_length")
        if self.min_digits > self.max_digits:
            raise ValueError("min_digits must not exceed max_digits")
        if self.kind == "reasoning_gym" and not self.name:
            raise ValueError("name: say which reasoning-gym dataset, e.g. 'letter_counting'")
        if self.kind == "reasoning_gym" and self.style != "answer":
            raise ValueError("style: reasoning_gym has no steps; use 'answer'")
        return self


def split_of(question: str) -> Split:
    """The split that owns this question, a pure function of its text."""
    tenth = xxhash.xxh3_64_intdigest(f"split/{question}".encode()) % 10
    return next(split for split, tenths in _TENTHS.items() if tenth in tenths)


def candidates(config: TaskConfig) -> Iterator[Problem]:
    """All problems of a task in order, splits mixed, duplicates included."""
    if config.kind == "reasoning_gym":
        source = reasoning.open_source(config.name, config.options, config.seed)
        return (
            reasoning.problem(source, config.name, config.options, config.seed, i)
            for i in itertools.count()
        )
    return stream(FAMILIES[config.kind], config, config.seed)


class ProblemSet(Sequence[Problem]):
    """The first ``num`` distinct problems of one split.

    A longer set starts with the shorter one. Raises `ConfigError` when the task has fewer.
    """

    def __init__(self, config: TaskConfig, split: Split, num: int) -> None:
        self.config, self.split = config, split
        self.problems: list[Problem] = []
        seen: set[str] = set()
        fruitless = 0
        source = candidates(config)
        while len(self.problems) < num:
            problem = next(source)
            fruitless += 1
            if problem.question not in seen and split_of(problem.question) == split:
                seen.add(problem.question)
                self.problems.append(problem)
                fruitless = 0
            if fruitless == _PATIENCE:
                raise ConfigError(
                    f"task {config.kind!r} has only {len(seen)} distinct problems in its split "
                    f"{split!r}, {num} were asked for: ask for fewer, or widen the task "
                    "(lengths, letters, digits, options)"
                )

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        return self.problems[index]


def majority_baseline(problems: Sequence[Problem]) -> float:
    """Accuracy of always giving the most common answer, in [0, 1]."""
    if not problems:
        raise ValueError("majority_baseline needs at least one problem")
    return Counter(p.answer for p in problems).most_common(1)[0][1] / len(problems)


Message = dict[str, str]


def prompt_messages(problem: Problem, config: TaskConfig) -> list[Message]:
    """The conversation up to the model's turn."""
    system = [{"role": "system", "content": config.system}] if config.system else []
    return [*system, {"role": "user", "content": problem.question}]


def solution_text(problem: Problem, config: TaskConfig) -> str:
    """What the model should say, in ``config.style``."""
    steps = problem.meta.get("steps", "")
    if config.style == "steps":
        return f"{steps}\nAnswer: {problem.answer}"
    if config.style == "tags":
        return f"<think>{steps}</think><answer>{problem.answer}</answer>"
    return problem.answer


def messages(problem: Problem, config: TaskConfig) -> list[Message]:
    """The whole conversation, for supervised fine-tuning."""
    answer = {"role": "assistant", "content": solution_text(problem, config)}
    return [*prompt_messages(problem, config), answer]
