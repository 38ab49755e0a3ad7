"""Config of the jobs that search for answers, and that label steps by rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.metrics import Metric
from shardwise.config.schema import (
    Fraction,
    JobConfig,
    NonNegativeFloat,
    PositiveInt,
    Rows,
    Section,
    SmallSizes,
    Weight,
    shown,
)
from shardwise.data.source import DataSource
from shardwise.rewards import AnyTask, CountLettersConfig, RewardConfig, fill_for_file
from shardwise.rewards.task_configs import KINDS, Split
from shardwise.rollout.config import RolloutConfig, Sampling
from shardwise.search.config import (
    AnyMethod,
    AnyScorer,
    BestOfNConfig,
    RolloutsConfig,
    RulesConfig,
    StepsConfig,
    check_scorer,
    check_steps,
)
from shardwise.stages.policy_config import small_reward

DRAWN = Metric("tokens_drawn", "tokens drawn for a problem", "tokens", format=".0f")
SHARED = Metric("shared_fraction", "share of prefixes that stood in a cache", format=".2f")


class SearchJobConfig(JobConfig):
    """What jobs have that draw answers."""

    step: StepsConfig = Field(default_factory=StepsConfig, description="where a step ends")
    sampling: Sampling = Field(
        default_factory=Sampling, description="of answers; max_new_tokens: of a whole one"
    )
    reward: RewardConfig = Field(
        default_factory=RewardConfig,
        description="which answers are right, for the rows that are written, the scorers verifier "
        "and rollouts, and the figures; default: exact, or answer for a file's problems",
    )
    labels: Literal["soft", "hard"] = Field(
        "soft", description="of steps: how often answers come out right; or whether any does"
    )
    chunk: PositiveInt = Field(
        16, description="problems whose results are stored together; a killed job loses one chunk"
    )
    rollout: RolloutConfig = Field(
        default_factory=RolloutConfig, description="how the model that draws is served"
    )
    concurrent: PositiveInt | None = Field(
        None,
        description="problems of a rank at a time; more than one is faster, and files are then the "
        "same to the last bit only where sums are rounded alike in any company; null: a chunk's "
        "where that is so (the native CPU step), else 1",
        examples=[16],
    )

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `JobConfig.shrunk`.

        An untrained model ends no answer, and earns nothing: one byte in eight ends one, steps are
        short, and any text earns some reward. Else no tree would have a value that could differ.
        """
        ends = {"max_new_tokens": 16, "stop_ids": tuple(range(0, 256, 8))}
        updates = {
            "sampling": self.sampling.model_copy(update=ends),
            "step": self.step.model_copy(update={"max_step_tokens": 4}),
            "reward": small_reward(folder),
            "rollout": self.rollout.shrunk(),
            # More than one part, and trees that share a cache.
            "chunk": min(self.chunk, 3),
            "concurrent": min(self.concurrent or 2, 2),
        }
        return super().shrunk(small, folder).model_copy(update=updates)


class ExtractConfig(Section):
    """Which rows are written."""

    above: Weight = Field(0.5, description="an answer whose reward is above it is right")
    sft_per_problem: PositiveInt | None = Field(
        4, description="right answers of a problem, distinct ones; null: all"
    )
    margin: NonNegativeFloat = Field(
        0.0, description="by how much the two sides of a pair must differ in worth", examples=[0.25]
    )
    worth: Literal["answers", "value", "score"] = Field(
        "answers",
        description="of a step: the mean reward of answers behind it, what the search backed up to "
        "it (mcts), or the scorer's word (rollouts)",
    )
    lowest_solve_rate: Fraction = Field(0.0, description="of the problems that are written")
    highest_solve_rate: Fraction = Field(1.0, description="of the problems that are written")

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.lowest_solve_rate > self.highest_solve_rate:
            self.refuse(("lowest_solve_rate",), "is above highest_solve_rate; nothing is between")
        return self


class SearchConfig(SearchJobConfig):
    """Search for answers to a task's problems, and data out of what was found.

    Writes whole trees, all finished answers with their reward, and of them rows for fine-tuning,
    pairs, labelled steps, and problems by difficulty.
    """

    model_config = shown(kind="search", method={"kind": "best_of_n"}, scorer={"kind": "verifier"})

    outputs = {
        "trees": "trees",
        "answers": "prompt-completion",
        "sft": "prompt-completion",
        "pairs": "preference",
        "steps": "steps",
        "problems": "problems",
    }

    kind: Literal["search"]
    task: AnyTask = Field(default_factory=CountLettersConfig)
    split: Split = Field("train_rl", description="which of the task's problems")
    num_problems: Rows | None = Field(128, description="how many; null: all of a file, its default")
    method: AnyMethod = Field(default_factory=BestOfNConfig)
    scorer: AnyScorer | None = Field(
        None,
        description="what scores answers and steps; null: nothing, for a majority vote",
        examples=[{"kind": "rollouts"}],
    )
    draws: str | None = Field(
        None,
        min_length=1,
        description="name of the draws: searches with the same one draw the same answers, so that "
        "what chooses among them is compared on them; null: the job's name",
        examples=["eight"],
    )
    extract: ExtractConfig = Field(default_factory=ExtractConfig)

    @model_validator(mode="after")
    def _all_of_a_file(self) -> Self:
        fill_for_file(self, "num_problems")
        return self

    @model_validator(mode="after")
    def _can_search(self) -> Self:
        try:
            check_scorer(self.method, self.scorer)
        except ValueError as error:
            self.refuse(("scorer",), str(error))
        if isinstance(self.scorer, RulesConfig) and self.task.rules is None:
            known = ", ".join(kind for kind, task in KINDS.items() if task.rules is not None)
            why = f"task {self.task.kind} takes the right answer to judge; with rules: {known}"
            self.refuse(("scorer", "kind"), why)
        try:
            check_steps(self.method, self.scorer, self.step)
        except ValueError as error:
            self.refuse(("scorer", "steps", "separator"), str(error))
        if self.sampling.greedy and self.method.kind != "best_of_n":
            self.refuse(("sampling", "greedy"), "draws the same step each time; nothing branches")
        worth = self.extract.worth
        if worth == "value" and self.method.kind != "mcts":
            self.refuse(("extract", "worth"), "value: only mcts backs values up; take answers")
        if worth == "score" and not isinstance(self.scorer, RolloutsConfig):
            self.refuse(("extract", "worth"), "score: needs the scorer rollouts; take answers")
        return self

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `Logs.metrics`."""
        return (
            Metric("chosen_right", "chosen answers that are right", better="higher", format=".3f",
                   line="right"),
            Metric("solved", "problems with a right answer among all", better="higher",
                   format=".3f", line="solved"),
            Metric("answers", "finished answers of a problem", format=".1f"),
            DRAWN,
            SHARED,
        )  # fmt: skip

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `JobConfig.shrunk`."""
        few: dict[str, Any] = {"num_problems": min(self.num_problems or 5, 5)}
        few["method"] = self.method.shrunk()
        if isinstance(self.scorer, RolloutsConfig):
            few["scorer"] = self.scorer.shrunk()
        return super().shrunk(small, folder).model_copy(update=few)


class LabelDataConfig(Section):
    """Solutions that are given."""

    sources: list[DataSource] = Field(
        min_length=1,
        description="rows of prompt, completion and the right answer (format prompt-completion "
        "with a column answer), as the job search writes them in answers",
        examples=[[{"from": "search.answers"}]],
    )


class LabelStepsConfig(SearchJobConfig):
    """Label the steps of given solutions by rollouts (Wang et al. 2023, Math-Shepherd).

    Each prefix is completed ``samples`` times; its label is the mean reward (soft), or
    whether any of them earns some (hard). For a stage of kind process_reward.
    """

    model_config = shown(kind="label_steps", data={"sources": [{"path": "solutions.jsonl"}]})

    outputs = {"steps": "steps"}

    kind: Literal["label_steps"]
    data: LabelDataConfig
    samples: PositiveInt = Field(4, description="answers drawn from each prefix")

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `Logs.metrics`."""
        return (Metric("label", "mean label of a step", format=".3f", line="label"), DRAWN, SHARED)

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `JobConfig.shrunk`. The solutions are made up: the user's may be long."""
        solutions = [self.step.separator.join("abc"[: 1 + i % 3]) for i in range(5)]
        rows = [
            {"prompt": f"{i}?", "completion": text, "answer": "c"}
            for i, text in enumerate(solutions)
        ]
        file = folder / f"{self.name}-solutions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = DataSource.model_validate({"kind": "prompt-completion", "path": file})
        made = super().shrunk(small, folder)
        longest = max(len(text.encode()) for text in solutions) + 8
        return made.model_copy(
            update={
                "data": LabelDataConfig(sources=[source]),
                "samples": min(self.samples, 2),
                "sampling": made.sampling.model_copy(update={"max_new_tokens": longest}),
            }
        )
