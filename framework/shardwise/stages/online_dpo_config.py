"""Config of preferences over the policy's own answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shardwise.config.metrics import Metric
from shardwise.losses.preference_config import AnyPreference, SigmoidConfig
from shardwise.stages.declarations import PREFERENCES
from shardwise.stages.policy_config import ScoredConfig, ScoredRoles


class OnlineDpoConfig(ScoredConfig):
    """Preferences over the policy's own answers, ranked by their scores (Guo et al. 2024).

    See `PolicyConfig`.
    """

    kind: Literal["online_dpo"]
    samples_per_prompt: int = Field(2, ge=2, le=2**16, description="answers that are ranked")
    loss: AnyPreference = Field(default_factory=SigmoidConfig)
    roles: ScoredRoles = Field(default_factory=ScoredRoles)

    @model_validator(mode="after")
    def _ranks(self) -> OnlineDpoConfig:
        if not self.loss.paired:
            self.refuse(("loss",), f"kind {self.loss.kind} compares no answers; take one that does")
        return self

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `StageLogs.metrics`."""
        pairs = Metric("pair_fraction", "prompts whose answers differ in score", "share of prompts")
        return (*super().metrics(), pairs, *PREFERENCES)

    @property
    def unused_roles(self) -> frozenset[str]:
        """Those whose word has no weight."""
        asked = {"reference": self.loss.with_reference, "reward": self.reward_model_weight}
        return frozenset(role for role, weight in asked.items() if not weight)
