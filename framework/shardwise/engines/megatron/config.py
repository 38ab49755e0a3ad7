"""Keys of the megatron engine alone."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from shardwise.config.schema import EngineConfig


class MegatronConfig(EngineConfig):
    """Megatron-core's model, parallelism, schedules and optimizer under our losses."""

    remark: ClassVar[str] = (
        "megatron on a CPU runs through a shim (engine.cpu_shim): for proof, not for speed"
    )

    kind: Literal["megatron"]
    layers: Literal["auto", "local", "te"] = Field(
        "auto",
        description="whose linear layers and norms: Transformer Engine's, or Megatron-core's own; "
        "auto: the former on a GPU where they are installed",
    )
    optimizer: Literal["auto", "megatron", "native"] = Field(
        "auto",
        description="whose masters, clipping and update: Megatron's (with ZeRO its distributed "
        "optimizer) or ours; auto: Megatron's where it computes what the recipe asks, else ours, "
        "with the reason in the run's events",
    )
    recompute: Literal["none", "full"] = Field(
        "none",
        description="what the backward pass computes again, to save memory; full: whole layers",
    )
    cpu_shim: bool = Field(
        False,
        description="run on a CPU all the same, redirected from outside: for proof, not for speed",
    )

    def for_verify(self) -> Self:
        """Small models may be computed through the shim."""
        return self.model_copy(update={"cpu_shim": True})
