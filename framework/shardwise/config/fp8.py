"""What a recipe says about 8-bit floats. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shardwise.config.section import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class SentinelConfig(Section):
    """Looks at quantised layers beside their unquantised shadow, and acts on what it sees."""

    enabled: bool = Field(True, description="look at all")
    every: PositiveInt = Field(50, description="steps between looks")
    layers: NonNegativeInt = Field(8, description="linear layers a look, in turn; 0: all")
    max_error: PositiveFloat = Field(0.2, description="of a product, relative to its shadow")
    max_underflow: Fraction = Field(0.5, description="of an operand's elements, rounded to zero")
    max_overflow: Fraction = Field(0.02, description="of an operand's elements, cut off")
    fallback: bool = Field(True, description="a layer beyond a limit computes unquantised from on")


class Fp8Config(Section):
    """Linear layers of blocks on 8-bit floats; see `ops.fp8`. Weights stay fp32 masters."""

    recipe: Literal["delayed", "current", "block", "mxfp8"] = Field(
        "delayed",
        description="where scales come from: past steps, the tensor itself, its blocks, MX blocks",
    )
    format: Literal["auto", "hybrid", "e4m3"] = Field(
        "auto",
        description="hybrid: e4m3 forward, e5m2 gradients; auto: hybrid, or e4m3 for block, mxfp8",
    )
    amax_history_len: Annotated[int, Field(ge=1, le=2**16)] = Field(
        1024, description="delayed: steps whose amax counts"
    )
    margin: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="delayed: scales are 2^margin smaller", examples=[1]
    )
    amax_compute: Literal["max", "most_recent"] = Field(
        "max", description="delayed: the largest of the history, or the last one"
    )
    modules: list[str] = Field(
        default_factory=lambda: ["layers.*"],
        min_length=1,
        description="path patterns of the linear layers to quantise, e.g. layers.*.mlp.*",
        examples=[["layers.*.mlp.*"]],
    )
    first_layers: NonNegativeInt = Field(1, description="blocks at the start left unquantised")
    last_layers: NonNegativeInt = Field(1, description="blocks at the end left unquantised")
    backend: Literal["auto", "te", "emulated"] = Field(
        "auto", description="auto: Transformer Engine where it can run, else emulated"
    )
    sentinel: SentinelConfig = Field(default_factory=SentinelConfig)

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_version(cls, data: Any) -> Any:
        """Recipes that were written out have ``domains: null``, now a key of the plain engine."""
        if isinstance(data, dict) and data.get("domains", ...) is None:
            return {key: value for key, value in data.items() if key != "domains"}
        return data
