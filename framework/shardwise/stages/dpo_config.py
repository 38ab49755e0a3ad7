"""Config of learning from preferences directly: DPO and its kin."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import Field, model_validator

from shardwise.config.metrics import Metric
from shardwise.config.section import shown
from shardwise.data.config import PairDataConfig, Reading
from shardwise.losses.preference_config import AnyPreference, SigmoidConfig
from shardwise.stages.declarations import PREFERENCES, with_validation
from shardwise.stages.policy_config import PolicyRoles
from shardwise.stages.ranking_config import RankingStageConfig


class DpoConfig(RankingStageConfig):
    """Learning from preferences directly: DPO (Rafailov et al. 2023) and kin, by ``loss``.

    See `RankingStageConfig`.
    """

    exact_logprobs = True

    model_config = shown(
        kind="dpo",
        steps=100,
        data={"sources": [{"kind": "preference-jsonl", "path": "pairs.jsonl"}]},
    )

    kind: Literal["dpo"]
    data: PairDataConfig = Field(default_factory=PairDataConfig)
    loss: AnyPreference = Field(default_factory=SigmoidConfig)
    reference: Literal["model", "precomputed", "none"] | None = Field(
        None,
        description="model: a frozen copy; precomputed: its log-probabilities, computed once and "
        "stored; none: no reference; default: what the loss asks for",
    )
    roles: PolicyRoles = Field(default_factory=PolicyRoles)

    @model_validator(mode="after")
    def _reference_fits(self) -> DpoConfig:
        loss = self.loss
        if not loss.with_reference and self.reference not in (None, "none"):
            self.refuse(
                ("reference",), f"loss.kind {loss.kind} compares with no reference; leave it out"
            )
        if loss.paired:
            return self
        if self.reference not in (None, "model"):
            self.refuse(
                ("reference",),
                f"{self.reference}: loss.kind {loss.kind} asks its reference about every batch's "
                "mismatched answers; write model, or leave it out",
            )
        if min(self.batch.global_batch, self.batch.ramp_start or 2) < 2:
            self.refuse(
                ("batch",), f"loss.kind {loss.kind} mismatches answers; a step needs 2 rows or more"
            )
        return self

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `StageLogs.metrics`."""
        return (*super().metrics(), *with_validation(*PREFERENCES))

    @property
    def reference_in_use(self) -> str:
        """``reference``, or what its default means."""
        return self.reference or ("model" if self.loss.with_reference else "none")

    @property
    def unused_roles(self) -> frozenset[str]:
        """A reference that nothing is compared with."""
        return frozenset({"reference"}) if self.reference_in_use == "none" else frozenset()

    def reading(self) -> Reading:
        """See `RankingStageConfig.reading`."""
        return dataclasses.replace(super().reading(), unpaired=not self.loss.paired)
