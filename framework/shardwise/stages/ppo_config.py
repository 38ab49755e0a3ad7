"""Config of PPO."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from shardwise.config.metrics import Metric
from shardwise.config.schema import NonNegativeInt, PositiveInt, RoleConfig, SmallSizes
from shardwise.losses.config import PpoLossConfig
from shardwise.stages.declarations import CRITIC, POLICY
from shardwise.stages.policy_config import ScoredConfig, ScoredRoles


class PpoRoles(ScoredRoles):
    """Models of the stage that are laid out, placed or started otherwise than the stage says."""

    critic: RoleConfig | None = Field(None, description="the model that predicts returns")


class PpoConfig(ScoredConfig):
    """Proximal policy optimisation (Schulman et al. 2017) with a critic.

    See `PolicyConfig`.
    """

    kind: Literal["ppo"]
    loss: PpoLossConfig = Field(default_factory=PpoLossConfig)
    roles: PpoRoles = Field(default_factory=PpoRoles)
    epochs_per_rollout: PositiveInt = Field(4, description="times that a rollout is learnt from")
    critic_warmup_steps: NonNegativeInt = Field(
        0, description="first steps: the critic alone", examples=[10]
    )

    @model_validator(mode="after")
    def _trains(self) -> PpoConfig:
        if self.critic_warmup_steps >= self.steps:
            self.refuse(
                ("critic_warmup_steps",),
                f"{self.critic_warmup_steps} of the stage's {self.steps} steps are for the critic "
                "alone; the actor would never be trained; give fewer, or more steps",
            )
        return self

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `StageLogs.metrics`."""
        return (*super().metrics(), *POLICY, *CRITIC)

    @property
    def unused_roles(self) -> frozenset[str]:
        """Those whose word has no weight."""
        weights = {"reference": self.loss.kl_coef, "reward": self.reward_model_weight}
        return frozenset(role for role, weight in weights.items() if not weight)

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `StageConfig.shrunk`; most steps train the actor."""
        warmup = {"critic_warmup_steps": min(self.critic_warmup_steps, 1)}
        return super().shrunk(small, folder).model_copy(update=warmup)
