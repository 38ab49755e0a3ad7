"""Process reward models: a scalar head that says of each step of an answer whether it is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardwise.data.batch import MicroBatch
from shardwise.data.steps import Solution, collate_solutions, encode_solution, read_solutions
from shardwise.data.tokenizer import Tokenizer
from shardwise.errors import DataError
from shardwise.losses.steps import StepLoss, measures
from shardwise.ops import rng
from shardwise.rewards import Problem, ProblemSet, TaskConfig, prompt_messages
from shardwise.rewards.task_configs import Split
from shardwise.rewards.tasks import solution_text
from shardwise.stages.base import StageContext
from shardwise.stages.process_reward_config import ProcessRewardConfig
from shardwise.stages.rankings import checked
from shardwise.stages.reward import ScalarStage


@dataclasses.dataclass(frozen=True)
class SolutionRows:
    """Solutions as `stages.data_shards` takes them."""

    solutions: Sequence[Solution]
    row_ids: Sequence[int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.solutions)

    def sizes(self, row: int) -> list[int]:
        """Steps of every answer."""
        return [len(self.solutions[row].ends)]

    def collate(self, rows: Sequence[int], num_real: int) -> MicroBatch:
        """See `data_shards.Rows`."""
        some, ids = [self.solutions[i] for i in rows], [self.row_ids[i] for i in rows]
        return collate_solutions(some, ids, self.pad_id, num_real=num_real)


class ProcessRewardStage(ScalarStage[Solution]):
    """See `ProcessRewardConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        super().__init__(ctx, *stage_solutions(ctx), StepLoss())

    def rows(self, samples: Sequence[Solution], first_id: int) -> SolutionRows:
        """See `ScalarStage.rows`."""
        ids = range(first_id, first_id + len(samples))
        return SolutionRows(samples, ids, self.ctx.tokenizer.pad_id)

    def measures(
        self, samples: Sequence[Solution], scores: list[list[np.ndarray]]
    ) -> dict[str, Any]:
        """See `ScalarStage.measures`."""
        return measures([of_row for [of_row] in scores], [s.labels for s in samples])


def stage_solutions(ctx: StageContext) -> tuple[list[Solution], list[Solution]]:
    """What a stage learns from, and what it is measured on. Raises DataError; see `checked`."""
    config: ProcessRewardConfig = ctx.stage
    reading = config.reading()
    train, held_out = (
        list(read_solutions(sources, ctx.tokenizer, dataclasses.replace(reading, part=part)))
        for sources, part in (config.data.training(), config.data.measured())
    )
    if config.task is not None:
        made = (ctx.tokenizer, config.task, config.data.separator, config.answers_per_problem)
        seed = ctx.run.seed
        train += made_solutions(*made, seed, "train_sft", config.num_problems)
        held_out += made_solutions(*made, seed, "held_out", config.num_held_out)
    return checked(ctx, train, held_out)


def made_solutions(
    tokenizer: Tokenizer,
    task: TaskConfig,
    separator: str,
    number: int,
    seed: int,
    split: Split,
    num: int | None,
) -> list[Solution]:
    """For each problem its right answer, and wrong ones: right up to some step."""
    problems = [] if num == 0 else ProblemSet(task, split, num)
    texts = [solution_text(p, task) for p in problems]
    steps = [[s for s in t.split(separator) if s.strip()] if separator else [t] for t in texts]
    found = []
    for index, problem in enumerate(problems):
        answers = [(steps[index], len(steps[index]))]
        for draw in range(number - 1):
            answers.append(_gone_wrong(problem, index, steps, draw, seed))
        for said, right in answers:
            labels = [float(n < right) for n in range(len(said))]
            asked = prompt_messages(problem, task)
            found.append(encode_solution(tokenizer, asked, said, labels, separator))
    return found


def _gone_wrong(
    problem: Problem, index: int, steps: Sequence[list[str]], draw: int, seed: int
) -> tuple[list[str], int]:
    """The steps of a problem, from some step on another's; and how many of them are right."""
    own = steps[index]
    for attempt in range(50):
        key = rng.key(seed, "wrong step", problem.question, draw, attempt)
        other = steps[key % len(steps)]
        right = rng.key(seed, "first wrong step", problem.question, draw, attempt) % len(own)
        if len(other) > right and other[right] != own[right]:
            return [*own[:right], *other[right:]], right
    raise DataError(f"problem {problem.question!r}: no other problem has other steps")
