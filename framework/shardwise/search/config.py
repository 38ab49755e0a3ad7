"""What a recipe says about search: the method, the steps, the scorer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.section import (
    Fraction,
    NonNegativeFloat,
    PositiveInt,
    Section,
    SeqLen,
    shown,
)
from shardwise.losses.config import StepScoresConfig
from shardwise.rewards.verifiers import Extract

Choose = Literal["best", "majority", "weighted"]


class StepsConfig(Section):
    """Where a reasoning step ends."""

    separator: str = Field("\n", min_length=1, description="text that ends a step")
    max_step_tokens: SeqLen = Field(64, description="a longer step is cut, and goes on as another")
    max_depth: PositiveInt = Field(32, description="steps of an answer; a longer one is given up")


class MethodConfig(Section):
    """What every method of search has."""

    budget_tokens: PositiveInt | None = Field(
        None,
        description="tokens that may be drawn for one problem, rollouts included; null: any number",
        examples=[2048],
    )
    stop_at: NonNegativeFloat | None = Field(
        None,
        description="a finished answer with such a score ends the search, and best_of_n draws one "
        "answer after the other; null: none does",
        examples=[1.0],
    )
    choose: Choose = Field(
        "best",
        description="the answer: of the best score, of most, or of the largest sum of scores",
    )
    extract: Extract = Field(
        "last_number", description="which part of an answer a vote is about", examples=["marker"]
    )

    def shrunk(self) -> Self:
        """The same with few draws (`shardwise.verify`)."""
        budget = None if self.budget_tokens is None else min(self.budget_tokens, 64)
        return self.model_copy(update={"budget_tokens": budget})


class BestOfNConfig(MethodConfig):
    """Whole answers, independent of each other."""

    model_config = shown(kind="best_of_n", samples=16)

    kind: Literal["best_of_n"] = "best_of_n"
    samples: PositiveInt = Field(8, description="answers of a problem")

    def shrunk(self) -> Self:
        """See `MethodConfig.shrunk`."""
        return super().shrunk().model_copy(update={"samples": min(self.samples, 3)})


class _BeamConfig(MethodConfig):
    samples: PositiveInt = Field(16, description="steps drawn in a round, as N in the paper")
    width: PositiveInt = Field(4, description="steps drawn from one step, as M in the paper")

    @model_validator(mode="after")
    def _width_divides(self) -> Self:
        if self.samples % self.width:
            self.refuse(("width",), f"must divide samples, which is {self.samples}")
        return self

    def shrunk(self) -> Self:
        """See `MethodConfig.shrunk`."""
        width = min(self.width, 2)
        samples = width * min(self.samples // self.width, 2)
        return super().shrunk().model_copy(update={"samples": samples, "width": width})


class BeamConfig(_BeamConfig):
    """Of all steps of a round, the best samples / width go on (Snell et al. 2024)."""

    kind: Literal["beam"] = "beam"


class DvtsConfig(_BeamConfig):
    """samples / width subtrees, of each of which the best step goes on (Beeching et al. 2024)."""

    kind: Literal["dvts"] = "dvts"


class MctsConfig(MethodConfig):
    """Monte Carlo tree search over steps."""

    kind: Literal["mcts"] = "mcts"
    simulations: PositiveInt = Field(64, description="walks from the prompt to a step")
    expand: PositiveInt = Field(4, description="steps drawn from one step")
    widen: Fraction = Field(
        0.0,
        description="a step of n visits has expand * n ** widen steps drawn from it; 0: expand, "
        "once and for all",
        examples=[0.5],
    )
    select: Literal["uct", "puct"] = Field(
        "puct", description="which step a walk takes: with the policy's priors, or without"
    )
    exploration: NonNegativeFloat = Field(
        1.25, description="weight of what was seldom visited, against what is known to be good"
    )
    backup: Literal["mean", "max"] = Field(
        "mean", description="what a step's value is, of the values found below it"
    )

    def shrunk(self) -> Self:
        """See `MethodConfig.shrunk`."""
        few = {"simulations": min(self.simulations, 6), "expand": min(self.expand, 2)}
        return super().shrunk().model_copy(update=few)


AnyMethod = Annotated[
    BestOfNConfig | BeamConfig | DvtsConfig | MctsConfig, Field(discriminator="kind")
]


class VerifierConfig(Section):
    """The reward of a finished answer, which knows the truth: for making data."""

    kind: Literal["verifier"] = "verifier"


class RulesConfig(Section):
    """1 while a text keeps to the task's rules, else 0; from the question alone.

    Of tasks sudoku and countdown: a doubled number, or a wrong sum, can never be right.
    """

    kind: Literal["rules"] = "rules"


class SelfConsistencyConfig(Section):
    """The share of a problem's answers that say the same (Wang et al. 2022)."""

    kind: Literal["self_consistency"] = "self_consistency"
    extract: Extract = Field("last_number", description="which part of an answer is compared")


class RolloutsConfig(Section):
    """The mean reward of answers that go on from a step (Wang et al. 2023, Math-Shepherd)."""

    kind: Literal["rollouts"] = "rollouts"
    samples: PositiveInt = Field(4, description="answers drawn from a step")

    def shrunk(self) -> Self:
        """With few answers (`shardwise.verify`)."""
        return self.model_copy(update={"samples": min(self.samples, 2)})


class RewardModelConfig(Section):
    """An outcome reward model's chance, sigmoid of its score, that an answer is right."""

    model_config = shown(kind="reward_model", model="reward")

    kind: Literal["reward_model"] = "reward_model"
    model: str = Field(
        min_length=1,
        description="an earlier stage, a shardwise checkpoint or a Hugging Face folder",
        examples=["/models/reward"],
    )


class ProcessRewardModelConfig(Section):
    """A process reward model's chances that the steps so far are right, as one score."""

    model_config = shown(kind="process_reward_model", model="process_reward")

    kind: Literal["process_reward_model"] = "process_reward_model"
    model: str = Field(
        min_length=1,
        description="an earlier stage, a shardwise checkpoint or a Hugging Face folder",
        examples=["/models/process_reward"],
    )
    steps: StepScoresConfig = Field(
        default_factory=StepScoresConfig, description="where it is read, and how often counts"
    )


AnyScorer = Annotated[
    VerifierConfig
    | RulesConfig
    | SelfConsistencyConfig
    | RolloutsConfig
    | RewardModelConfig
    | ProcessRewardModelConfig,
    Field(discriminator="kind"),
]
_WHOLE: Mapping[str, str] = {
    "verifier": "judges finished answers; rollouts carry its verdict to steps",
    "self_consistency": "compares finished answers",
}


def check_scorer(method: MethodConfig, scorer: Section | None) -> None:
    """Raise ValueError for a method that needs a scorer, and has none that can score for it."""
    kind = getattr(method, "kind", "")
    if method.stop_at is not None and (scorer is None or isinstance(scorer, SelfConsistencyConfig)):
        raise ValueError("method.stop_at waits for a score of a single answer; nothing gives one")
    if scorer is None:
        if kind == "best_of_n" and method.choose == "majority":
            return
        mend = " or choose: majority" if kind == "best_of_n" else ""
        raise ValueError(
            f"{kind} needs a scorer: write scorer: {{kind: process_reward_model, ...}}, rollouts, "
            f"or another{mend}"
        )
    why = _WHOLE.get(getattr(scorer, "kind", ""))
    if why and kind != "best_of_n":
        raise ValueError(f"{kind} scores single steps, and the scorer {scorer.kind} {why}")  # type: ignore[attr-defined]


def check_steps(method: MethodConfig, scorer: Section | None, steps: StepsConfig) -> None:
    """Raise ValueError for a process reward model that cuts steps where the search does not.

    A search of whole answers has no steps; a scorer that reads every token cuts at all of them.
    """
    if not isinstance(scorer, ProcessRewardModelConfig) or isinstance(method, BestOfNConfig):
        return
    if scorer.steps.separator not in ("", steps.separator):
        raise ValueError(
            f"{scorer.steps.separator!r} ends a step for the scorer, and {steps.separator!r} "
            "(step.separator) for the search; write the one that the model was trained with in both"
        )
