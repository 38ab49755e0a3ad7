"""What a stage trains in place of its whole model: an adapter, or parts of it.

Kinds of adapters, and what they compute: `shardwise.adapters`. Nothing here imports torch; another
package registers a kind of its own by the entry-point group ``shardwise.adapters``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator

from shardwise.config import registry
from shardwise.config.optimizers import ParameterGroup
from shardwise.config.section import PositiveInt, Section


class AdapterConfig(Section):
    """Small trained parts beside a model that stands still; what every kind has.

    Kinds derive from it, fix ``kind`` and register themselves. ``merges``: whether a plain model's
    weights can say the same; else base and adapter are served side by side.
    """

    merges: ClassVar[bool] = True

    kind: str = Field(description="which adapter")
    start: Literal["new", "parent"] = Field(
        "new",
        description="new: an adapter on all that the stage starts from; parent: go on with the "
        "adapter of the checkpoint that the stage starts from",
    )
    quantise: Literal["nf4", "int8"] | None = Field(
        None,
        description="keep the linear layers of all blocks, which stand still, in 4 bits (QLoRA) or "
        "8 bits a weight; null: as they are",
    )

    def groups(self) -> list[ParameterGroup]:
        """Parameters of the adapter with a rate of their own; behind those that a recipe names."""
        return []

    def without_dropout(self) -> Self:
        """For stages whose losses cannot bear its noise."""
        return self

    def shrunk(self) -> Self:
        """For a model of a few narrow layers."""
        return self


def _adapter(data: Any, info: ValidationInfo) -> Any:
    return registry.validate(data, info, "kind", registry.ADAPTER_CONFIGS, AdapterConfig)


AnyAdapter = SerializeAsAny[Annotated[AdapterConfig, BeforeValidator(_adapter)]]


class FreezeConfig(Section):
    """Parameters that a stage leaves as they are. All others are trained."""

    patterns: list[str] = Field(
        default=[],
        description="of parameter names, e.g. embed.weight or layers.*.attn.*",
        examples=[["embed.weight"]],
    )
    train_last: PositiveInt | None = Field(
        None,
        description="train the last so many layers and what is behind them; null: all",
        examples=[2],
    )

    @model_validator(mode="after")
    def _freezes_something(self) -> Self:
        if not self.patterns and self.train_last is None:
            raise ValueError("freezes nothing; give patterns or train_last, or leave freeze out")
        return self
