"""What configs of stages share that learn from their own completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from shardwise.config.metrics import Metric
from shardwise.config.schema import (
    NonNegativeInt,
    PositiveInt,
    RoleConfig,
    Rows,
    Section,
    SmallSizes,
    StageConfig,
    Weight,
)
from shardwise.config.section import beside
from shardwise.losses.config import StepScoresConfig
from shardwise.rewards import (
    AnyTask,
    CountLettersConfig,
    RewardConfig,
    fill_for_file,
)
from shardwise.rollout.config import RolloutConfig, Sampling
from shardwise.stages.declarations import POLICY_LOSS, REWARD, ROLLOUT

SMALL_REWARD = '''"""Rewards that any text earns some of, an untrained model's too."""


def score(question, completion, answer, meta):
    return (sum(completion.encode()) * 7 + len(completion)) % 5 / 4


def score_most(question, completion, answer, meta):
    """Nothing for about every fifth completion, and for all of about every fourth problem."""
    if sum(completion.encode()) % 5 == 3 or sum(question.encode()) % 4 == 2:
        return None
    return score(question, completion, answer, meta)
'''


def small_reward(folder: Path, refuses: bool = False) -> RewardConfig:
    """One of those: a verifier would never pay an untrained model.

    In a file of ``folder``. ``refuses``: some completions have no score.
    """
    name = "score_most" if refuses else "score"
    file = folder / f"reward_{name}.py"
    file.write_text(SMALL_REWARD, encoding="utf-8")
    return RewardConfig.model_validate({"parts": [{"kind": "user", "function": f"{file}:{name}"}]})


class PolicyRoles(Section):
    """Models of the stage that are laid out, placed or started otherwise than the stage says."""

    actor: RoleConfig | None = Field(None, description="the model that is trained and writes")
    reference: RoleConfig | None = Field(
        None, description="the frozen model that it is held against"
    )


class PolicyConfig(StageConfig):
    """``batch.global_batch`` prompts a step, ``samples_per_prompt`` completions each.

    ``batch.micro_batch`` counts prompts, each with all its completions.
    """

    on_policy = exact_logprobs = True

    task: AnyTask = Field(default_factory=CountLettersConfig)
    num_problems: Rows | None = Field(
        4096, description="problems of the task's train_rl split; null: all of a file, its default"
    )
    samples_per_prompt: Annotated[int, Field(ge=1, le=2**16)] = Field(
        1, description="completions of each prompt"
    )
    sampling: Sampling = Field(default_factory=Sampling)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(
        default_factory=RewardConfig,
        description="the verifier; default: exact, or answer for a file's problems",
    )
    updates_per_rollout: PositiveInt = Field(1, description="mini-batches, by prompts")
    epochs_per_rollout: PositiveInt = Field(1, description="times that a rollout is learnt from")
    keep_rollouts_every: NonNegativeInt = Field(
        0, description="steps between stored rollouts", examples=[20]
    )

    max_unscorable_steps: PositiveInt = Field(
        5, description="steps in a row without any scored completion before the run ends"
    )

    @model_validator(mode="after")
    def _all_of_a_file(self) -> Self:
        fill_for_file(self, "num_problems")
        return self

    @model_validator(mode="after")
    def _can_learn(self) -> PolicyConfig:
        if self.batch.global_batch % self.updates_per_rollout:
            raise ValueError(
                f"updates_per_rollout {self.updates_per_rollout} must divide "
                f"batch.global_batch {self.batch.global_batch}"
            )
        if self.sampling.greedy:
            raise ValueError("sampling.greedy explores nothing; nothing can be learnt")
        if self.batch.ramp_start is not None:
            raise ValueError(
                "batch.ramp_start: every rollout has the same number of prompts; leave it out"
            )
        return self

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `StageLogs.metrics`; the reward comes first."""
        return (*ROLLOUT, *super().metrics(), POLICY_LOSS)

    @classmethod
    def best(cls) -> Metric | None:
        """See `StageLogs.best`."""
        return REWARD

    @property
    def updates_per_batch(self) -> int:
        """Each learns from some of a rollout's prompts."""
        return self.updates_per_rollout

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `StageConfig.shrunk`.

        An untrained model earns nothing from a verifier, and nothing would be learnt from it: the
        reward is one that any text earns some of, but for a few that it refuses to score.
        """
        samples = min(self.samples_per_prompt, 3)
        updates = {
            "num_problems": min(self.num_problems or 64, 64),
            "samples_per_prompt": samples,
            "sampling": self.sampling.model_copy(update={"max_new_tokens": 6}),
            "rollout": self.rollout.shrunk(),
            "reward": small_reward(folder, refuses=True),
            "max_unscorable_steps": max(self.max_unscorable_steps, small.steps),
            # The second time, a rollout's weights have moved; a third shows nothing new.
            "epochs_per_rollout": min(self.epochs_per_rollout, 2),
            "keep_rollouts_every": 1,
        }
        return super().shrunk(small, folder).model_copy(update=updates)


class ScoredConfig(PolicyConfig):
    """Completions are scored by a verifier, a reward model, or both."""

    verifier_weight: Weight = Field(1.0, description="of the verifier's reward in the score")
    reward_model_weight: Weight = Field(
        0.0, description="of the reward model's; 0: no such role", examples=[1.0]
    )
    reward_steps: StepScoresConfig | None = Field(
        None,
        description="the reward model is one of kind process_reward, which scores steps; null: "
        "it scores answers",
        examples=[{"aggregate": "min"}],
        json_schema_extra=beside(reward_model_weight=1.0),
    )

    @model_validator(mode="after")
    def _rewards(self) -> Self:
        if self.verifier_weight == 0.0 and self.reward_model_weight == 0.0:
            raise ValueError("verifier_weight and reward_model_weight are 0; nothing is rewarded")
        if self.reward_steps is not None and not self.reward_model_weight:
            self.refuse(
                ("reward_steps",), "reward_model_weight is 0, so there are no scores; set it"
            )
        return self

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `StageConfig.shrunk`. An untrained model writes no separators: tokens are steps."""
        found = super().shrunk(small, folder)
        if found.reward_steps is None:
            return found
        steps = found.reward_steps.model_copy(update={"separator": ""})
        return found.model_copy(update={"reward_steps": steps})


class ScoredRoles(PolicyRoles):
    """Models of the stage that are laid out, placed or started otherwise than the stage says."""

    reward: RoleConfig | None = Field(None, description="the frozen model that scores")
