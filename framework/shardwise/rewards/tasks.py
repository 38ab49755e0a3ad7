"""The problems of a task as stages take them, and how they are written.

The split of a generated problem is a hash of its question alone, so no question can be in two
splits, whatever the seed, the number of problems or the order in which they are asked for; and
because the hash knows nothing of difficulty, the splits are equally hard. Of a file, a share is
told in the same way, or a second file is compared with the first. Splits are free of duplicates.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, overload

from shardwise.errors import ConfigError
from shardwise.rewards.families import Problem
from shardwise.rewards.task_configs import Split, TaskConfig

Message = dict[str, Any]


class ProblemSet(Sequence[Problem]):
    """The first ``num`` distinct problems of one split; None: all (of a file).

    A longer set starts with the shorter one. Raises `ConfigError` when the task has fewer, or
    none.
    """

    def __init__(self, config: TaskConfig, split: Split, num: int | None) -> None:
        self.config, self.split = config, split
        self.problems = list(itertools.islice(config.problems(split), num))
        wanted = 1 if num is None else num
        if len(self.problems) < wanted:
            raise ConfigError(config.too_few(split, len(self.problems), wanted))

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        return self.problems[index]


def count(config: TaskConfig, split: Split, num: int | None) -> int:
    """How many problems `ProblemSet` takes."""
    return sum(1 for _ in config.problems(split)) if num is None else num


def majority_baseline(problems: Sequence[Problem]) -> float:
    """Accuracy of always giving the most common answer, in [0, 1]."""
    if not problems:
        raise ValueError("majority_baseline needs at least one problem")
    answers = Counter(answer for p in problems for answer in (p.answer, *p.others))
    return answers.most_common(1)[0][1] / len(problems)


def prompt_messages(problem: Problem, config: TaskConfig) -> list[Message]:
    """The conversation up to the model's turn."""
    asked = problem.messages or [{"role": "user", "content": problem.question}]
    system = [{"role": "system", "content": config.system}] if config.system else []
    if any(m["role"] == "system" for m in asked):
        system = []
    return [*system, *map(dict, asked)]


def solution_text(problem: Problem, config: TaskConfig) -> str:
    """What the model should say, in ``config.style``."""
    steps = problem.meta.get("steps", "")
    if config.style != "answer" and not steps:
        raise ConfigError(
            f"{problem.id}: has no steps, and task.style is {config.style}; give its row the field "
            "steps, or the task answer_after, or take style: answer"
        )
    if config.style == "steps":
        return f"{steps}\nAnswer: {problem.answer}"
    if config.style == "tags":
        return f"<think>{steps}</think><answer>{problem.answer}</answer>"
    return problem.answer


def messages(problem: Problem, config: TaskConfig) -> list[Message]:
    """The whole conversation, for supervised fine-tuning."""
    answer = {"role": "assistant", "content": solution_text(problem, config)}
    return [*prompt_messages(problem, config), answer]
