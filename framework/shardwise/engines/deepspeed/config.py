"""Keys of the DeepSpeed engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from shardwise.config.schema import EngineConfig, StageConfig
from shardwise.engines.deepspeed import user_config
from shardwise.parallel.layout import Layout


class DeepSpeedConfig(EngineConfig):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020), stages 0 to 3, one model replica a data rank."""

    remark: ClassVar[str] = (
        "deepspeed keeps fp32 masters: its layouts are compared in their own precision alone"
    )

    kind: Literal["deepspeed"]
    config: dict[str, Any] | Path | None = Field(
        None,
        description="DeepSpeed's own JSON, a file or a mapping; what contradicts the recipe is an "
        "error, what the recipe does not say is passed on",
        examples=[{"zero_optimization": {"reduce_bucket_size": 500000000}}],
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="where optimizer states and masters live (ZeRO-Offload, ZeRO-Infinity)",
    )
    offload_param: Literal["none", "cpu", "nvme"] = Field(
        "none", description="zero3: where parameters live between uses (ZeRO-Infinity)"
    )
    nvme_path: Path | None = Field(
        None,
        description="a folder on each node's NVMe disk, for what is offloaded to nvme; a run makes "
        "one of its own in it and removes that at its end",
        examples=["/local_nvme"],
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="see the native engine's"
    )

    @field_validator("config", mode="after")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        """The file's content in place of its name: a run keeps what it was started with."""
        return user_config.read(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if self.fp8 is not None:
            self.refuse(("fp8",), "engine.kind: deepspeed has no FP8; write kind: native")
        return self

    def refusal(self, layout: Layout, stage: StageConfig | None = None) -> str | None:
        """See `EngineConfig`."""
        for axis, words in (("tp", "tensor"), ("pp", "pipeline")):
            if getattr(layout, axis) > 1:
                return (
                    f"engine.kind: deepspeed has data and context parallelism, no {words} "
                    f"parallelism; drop {axis}{getattr(layout, axis)} of engine.layout {layout}, "
                    "or write kind: native"
                )
        if layout.zero and layout.shard != layout.dp:
            return (
                f"engine.kind: deepspeed shards over all data ranks; drop hsdp{layout.shard} of "
                f"engine.layout {layout}, or write kind: native"
            )
        if self.precision in ("fp16", "fp64"):
            return (
                "engine.kind: deepspeed trains in bf16 or fp32; write one of them in place of "
                f"engine.precision: {self.precision}, or kind: native"
            )
        if self.precision == "bf16" and not layout.zero:
            return (
                "engine.kind: deepspeed without ZeRO sums bf16 gradients in bf16, over "
                f"micro-batches and ranks; write zero1 in engine.layout {layout}, whose weights "
                "are as whole on every rank, or engine.precision: fp32"
            )
        if self.offload_optimizer != "none" and not layout.zero:
            return "engine.offload_optimizer needs ZeRO; write zero1, zero2 or zero3"
        if self.offload_param != "none" and layout.zero != 3:
            return f"engine.offload_param needs zero3, and engine.layout is {layout}"
        for key in ("offload_optimizer", "offload_param"):
            if user_config.device_of(self, key) == "nvme":
                if layout.zero != 3:
                    return f"engine.{key}: nvme needs zero3, and engine.layout is {layout}"
                if self.nvme_path is None:
                    return f"engine.{key}: nvme needs engine.nvme_path, a folder on such a disk"
        return user_config.contradiction(self, layout, stage)
