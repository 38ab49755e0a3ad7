"""Kinds of adapters as a recipe names them. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.adapters import AdapterConfig
from shardwise.config.optimizers import ParameterGroup
from shardwise.config.section import BelowOne, PositiveFloat, PositiveInt, Rate

SMALL_RANK = 4
ALL_LINEAR = "all-linear"


class LowRankConfig(AdapterConfig):
    """What LoRA and its kin have."""

    magnitudes: ClassVar[bool]  # whether the norms of the rows are trained as well

    rank: PositiveInt = 16
    alpha: PositiveFloat = Field(32.0, description="scaling = alpha / rank")
    rslora: bool = Field(False, description="scaling = alpha / sqrt(rank)")
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        default=[ALL_LINEAR],
        description="patterns of module paths (layers.*.attn.q) or last names (q); all-linear: the "
        "linear layers of all blocks. head and embed by name alone",
    )
    dropout: BelowOne = Field(0.0, description="of what goes into A, while training")
    init: Literal["default", "pissa", "orthogonal"] = Field(
        "default",
        description="default: A random, B zero; pissa: the largest singular vectors of W, taken "
        "off again; orthogonal: A and B random with B A = 0",
    )
    lr_ratio: Rate = Field(1.0, description="LoRA+: learning rate of B over that of A")

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(
                f"init orthogonal halves the rank, and {self.rank} is odd; make it even"
            )
        return self

    @property
    def scaling(self) -> float:
        """What ``B A`` is multiplied by (rsLoRA: Kalajdzievski 2023, section 3)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def groups(self) -> list[ParameterGroup]:
        """LoRA+ (Hayou et al. 2024): B learns faster than A."""
        if self.lr_ratio == 1.0:
            return []
        return [ParameterGroup(match="*.adapter.B", lr_scale=self.lr_ratio)]

    def without_dropout(self) -> Self:
        """See `AdapterConfig`."""
        return self.model_copy(update={"dropout": 0.0})

    def shrunk(self) -> Self:
        """See `AdapterConfig`; the scaling stays."""
        rank = min(self.rank, SMALL_RANK if self.init == "orthogonal" else SMALL_RANK - 1)
        factor = (rank / self.rank) ** (0.5 if self.rslora else 1.0)
        fields = {"rank": rank, "alpha": self.alpha * factor, "start": "new"}
        return self.model_copy(update=fields)


class LoraConfig(LowRankConfig):
    """Low-rank updates of weight matrices: ``W + scaling * B A`` (Hu et al. 2021)."""

    magnitudes: ClassVar[bool] = False

    kind: Literal["lora"]


class DoraConfig(LowRankConfig):
    """LoRA with trained magnitudes of the rows: ``m (W + s B A) / |W + s B A|`` (Liu et al. 2024).

    The norm counts as a constant in the backward pass (their section 4.3).
    """

    magnitudes: ClassVar[bool] = True

    kind: Literal["dora"]
