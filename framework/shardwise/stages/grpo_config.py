"""Config of GRPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.config.metrics import Metric
from shardwise.losses.config import PolicyLossConfig
from shardwise.stages.declarations import GROUPS, POLICY
from shardwise.stages.policy_config import PolicyConfig, PolicyRoles


class GrpoConfig(PolicyConfig):
    """Group-relative policy optimisation (Shao et al. 2024) and kin, by ``loss``.

    See `PolicyConfig`.
    """

    kind: Literal["grpo"]
    samples_per_prompt: int = Field(8, ge=2, le=2**16, description="size of a group")
    loss: PolicyLossConfig = Field(default_factory=PolicyLossConfig)
    roles: PolicyRoles = Field(default_factory=PolicyRoles)

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `StageLogs.metrics`."""
        return (*super().metrics(), *POLICY, *GROUPS)

    @property
    def unused_roles(self) -> frozenset[str]:
        """A reference whose word has no weight."""
        return frozenset() if self.loss.kl_coef else frozenset({"reference"})

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the weights move between the rollout and some update of its step."""
        updates = self.updates_per_rollout * self.epochs_per_rollout
        return updates > 1 or self.loss.importance_cap is not None
