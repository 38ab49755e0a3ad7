"""What a recipe says of what happens around the steps of its stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator

from shardwise.config import registry
from shardwise.config.names import Name
from shardwise.config.section import PositiveInt, Section, Weight, shown


class CallbackConfig(Section):
    """What every callback has.

    Callbacks derive from it, fix ``kind`` and register.
    """

    kind: str = Field(description="what it does")
    name: Name = Field(examples=["too_far"])
    stages: list[str] = Field(
        default=[], description="it goes with these; none: with all", examples=[["grpo"]]
    )


class StopWhenConfig(CallbackConfig):
    """Ends the run (exit code 3) where a metric leaves its bounds, or is no number.

    The checkpoints stay; the same command goes on from the newest.
    """

    model_config = shown(kind="stop_when", metric="kl", above=10.0)

    kind: Literal["stop_when"]
    metric: str = Field(description="of a step or a validation", examples=["kl"])
    above: Weight | None = Field(None, description="the highest allowed", examples=[10.0])
    below: Weight | None = Field(None, description="the lowest allowed", examples=[0.1])
    patience: PositiveInt = Field(1, description="times in a row that it must be beyond")

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.above is None and self.below is None:
            raise ValueError(f"stop_when {self.metric}: beyond what? give above, below, or both")
        return self


def _callback(data: Any, info: ValidationInfo) -> Any:
    return registry.validate(data, info, "kind", registry.CALLBACK_CONFIGS, CallbackConfig)


AnyCallback = SerializeAsAny[Annotated[CallbackConfig, BeforeValidator(_callback)]]
