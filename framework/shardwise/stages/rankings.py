"""Rankings as stages learn from them: read from files or made of a task's problems, and as rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import xxhash

from shardwise.data.batch import MicroBatch
from shardwise.data.preferences import (
    Ranking,
    collate_rankings,
    encode_ranking,
    read_rankings,
)
from shardwise.data.steps import Solution
from shardwise.data.tokenizer import Tokenizer
from shardwise.errors import DataError
from shardwise.ops import rng
from shardwise.rewards import Problem, ProblemSet, TaskConfig, prompt_messages
from shardwise.rewards.task_configs import Split
from shardwise.rewards.tasks import solution_text
from shardwise.stages.base import StageContext
from shardwise.stages.ranking_config import AnswersConfig, RankingStageConfig

S = TypeVar("S", Ranking, Solution)


@dataclasses.dataclass(frozen=True)
class RankingRows:
    """Rankings as `stages.data_shards` takes them.

    ``scored``: one number an answer, at its end token; else one a token. ``per_token``: further
    extras, for each answer a number or one a token.
    """

    rankings: Sequence[Ranking]
    row_ids: Sequence[int]
    pad_id: int
    scored: bool = True
    per_token: Mapping[str, Sequence[Sequence[Any]]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rankings)

    def sizes(self, row: int) -> list[int]:
        """Valid tokens of every answer."""
        return [1 if self.scored else len(a) for a in self.rankings[row].answers]

    def collate(self, rows: Sequence[int], num_real: int) -> MicroBatch:
        """See `data_shards.Rows`."""
        return collate_rankings(
            [self.rankings[i] for i in rows],
            [self.row_ids[i] for i in rows],
            self.pad_id,
            num_real=num_real,
            scored=self.scored,
            per_token={name: [values[i] for i in rows] for name, values in self.per_token.items()},
        )


def stage_rankings(ctx: StageContext) -> tuple[list[Ranking], list[Ranking]]:
    """What a stage learns from, and what it is measured on.

    Raises DataError for what is too long, and where nothing is left to learn from.
    """
    config: RankingStageConfig = ctx.stage
    reading = config.reading()
    train, held_out = (
        list(read_rankings(sources, ctx.tokenizer, dataclasses.replace(reading, part=part)))
        for sources, part in (config.data.training(), config.data.measured())
    )
    if config.task is not None:
        made = (ctx.tokenizer, config.task, config.answers_per_problem, ctx.run.seed)
        train += made_rankings(*made, "train_sft", config.num_problems)
        held_out += made_rankings(*made, "held_out", config.num_held_out)
    return checked(ctx, train, held_out)


def checked(ctx: StageContext, train: list[S], held_out: list[S]) -> tuple[list[S], list[S]]:
    """The same; DataError for what is too long, and where nothing is left to learn from."""
    config: AnswersConfig = ctx.stage
    if not train:
        raise DataError(f"stage {config.name}: no row is left to learn from")
    for sample in (*train, *held_out):
        if sample.longest > config.batch.seq_len:
            raise DataError(
                f"stage {config.name}: a prompt with its longest answer has {sample.longest} "
                f"tokens, batch.seq_len is {config.batch.seq_len}; raise it, or drop the line"
            )
    return train, held_out


def samples_hash(*parts: Sequence[Ranking | Solution]) -> str:
    """xxh3-128 of all tokens and verdicts."""
    # Not `astuple`, which copies every number by itself.
    said = json.dumps([list(vars(r).values()) for part in parts for r in part])
    return xxhash.xxh3_128_hexdigest(said.encode())


def made_rankings(
    tokenizer: Tokenizer, task: TaskConfig, number: int, seed: int, split: Split, num: int | None
) -> list[Ranking]:
    """The right answer first, then distinct answers of other problems that are wrong here."""
    problems = [] if num == 0 else ProblemSet(task, split, num)
    pool = [p.answer for p in problems]
    rankings = []
    for problem in problems:
        answers = [problem.answer, *_wrong_answers(problem, pool, number - 1, seed)]
        texts = [solution_text(problem._replace(answer=a), task) for a in answers]
        ratings = [1.0] + [0.0] * (len(texts) - 1)
        rankings.append(encode_ranking(tokenizer, prompt_messages(problem, task), texts, ratings))
    return rankings


def _wrong_answers(problem: Problem, pool: Sequence[str], number: int, seed: int) -> list[str]:
    """Distinct answers of other problems, drawn as often as they occur; fewer if there are not."""
    found: list[str] = []
    for draw in range(50 * number):
        answer = pool[rng.key(seed, "wrong answer", problem.question, draw) % len(pool)]
        if answer not in (problem.answer, *problem.others, *found):
            found.append(answer)
        if len(found) == number:
            break
    if not found:
        raise DataError(f"problem {problem.question!r}: no other problem has another answer")
    return found
