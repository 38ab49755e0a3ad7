"""Config of learning from a teacher's distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from shardwise.config.metrics import Metric
from shardwise.config.schema import Fraction, RoleConfig, Section, SmallSizes
from shardwise.config.section import beside, shown
from shardwise.losses.distill_config import DivergenceConfig
from shardwise.rollout.config import RolloutConfig, Sampling
from shardwise.stages.declarations import TAUGHT
from shardwise.stages.sft_config import CHATS, ChatStageConfig


class DistillRoles(Section):
    """Models of the stage that are laid out, placed or started otherwise than the stage says."""

    actor: RoleConfig | None = Field(None, description="the student, which is trained")
    teacher: RoleConfig | None = Field(
        None,
        description="the frozen model that it learns from; init_from says which, and its "
        "vocabulary is the student's",
        examples=[{"init_from": "/models/teacher"}],
    )


class DistillConfig(ChatStageConfig):
    """A student learns a teacher's distribution of each token (Hinton et al. 2015), of given texts
    or of its own (Agarwal et al. 2023).
    """

    on_policy = exact_logprobs = True

    model_config = shown(kind="distill", steps=100, data=CHATS)

    kind: Literal["distill"]
    loss: DivergenceConfig = Field(default_factory=DivergenceConfig)
    on_policy_fraction: Fraction = Field(
        0.0,
        description="share of updates on texts that the student writes, to problems of task (GKD's "
        "lambda); batch.global_batch prompts each",
        examples=[0.5],
        json_schema_extra=beside(task={"kind": "count_letters"}),
    )
    samples_per_prompt: int = Field(1, ge=1, le=2**16, description="texts of each prompt")
    sampling: Sampling = Field(default_factory=Sampling)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    roles: DistillRoles = Field(default_factory=DistillRoles)

    @model_validator(mode="after")
    def _can_write(self) -> Self:
        if self.on_policy_fraction and self.task is None:
            self.refuse(
                ("on_policy_fraction",), "the student writes to a task's problems; give one"
            )
        if self.on_policy_fraction and self.batch.ramp_start is not None:
            self.refuse(
                ("batch", "ramp_start"), "rollouts have as many prompts always; leave it out"
            )
        return self

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `StageLogs.metrics`."""
        return (*super().metrics(), *TAUGHT)

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `StageConfig.shrunk`; of few steps, one is on-policy wherever some are."""
        words = None if self.loss.top_k is None else min(self.loss.top_k, 16)
        fraction = self.on_policy_fraction
        updates = {
            "samples_per_prompt": min(self.samples_per_prompt, 3),
            "sampling": self.sampling.model_copy(update={"max_new_tokens": 6}),
            "rollout": self.rollout.shrunk(),
            "loss": self.loss.model_copy(update={"top_k": words}),
            "on_policy_fraction": fraction if fraction in (0.0, 1.0) else 0.5,
        }
        return super().shrunk(small, folder).model_copy(update=updates)
