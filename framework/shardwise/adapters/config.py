"""Kinds of adapters as a recipe names them. Nothing here imports torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from shardwise.adapters.presets import ADAPTER_PRESETS, ALL_LINEAR
from shardwise.config.adapters import AdapterConfig
from shardwise.config.optimizers import ParameterGroup
from shardwise.config.section import BelowOne, PositiveFloat, PositiveInt, Rate, shown

SMALL_RANK, SMALL_SIZE = 4, 8


def names_module(pattern: str, path: str) -> bool:
    """Whether a pattern of module paths, or a last name, is one of ``path``."""
    last = path.rpartition(".")[2]
    return fnmatch.fnmatchcase(path, pattern) or ("." not in pattern and last == pattern)


def _first(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((v for pattern, v in patterns.items() if names_module(pattern, path)), default)


class LowRankConfig(AdapterConfig):
    """What LoRA and its kin have."""

    magnitudes: ClassVar[bool]  # whether the norms of the rows are trained as well

    preset: (
        Literal[
            "lora_gpt2", "qlora_paper", "dora_paper", "pissa_paper", "lora_without_regret",
            "peft_default", "trl_default",
        ]
        | None
    ) = Field(None, description="published settings, see shardwise.adapters.presets")  # fmt: skip
    rank: PositiveInt = Field(16, description="columns of B and rows of A")
    alpha: PositiveFloat = Field(32.0, description="scaling = alpha / rank")
    rslora: bool = Field(False, description="scaling = alpha / sqrt(rank)")
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        default=[ALL_LINEAR],
        description="patterns of module paths (layers.*.attn.q) or last names (q); all-linear: the "
        "linear layers of all blocks. head and embed by name alone",
        examples=[["q", "v"]],
    )
    dropout: BelowOne = Field(
        0.0, description="of what goes into A, while training", examples=[0.05]
    )
    init: Literal["default", "pissa", "orthogonal"] = Field(
        "default",
        description="default: A random, B zero; pissa: the largest singular vectors of W, taken "
        "off again; orthogonal: A and B random with B A = 0",
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        default={},
        description="ranks of their own, by patterns as in targets",
        examples=[{"layers.0.*": 4}],
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default={},
        description="alphas of their own, by patterns as in targets",
        examples=[{"layers.0.*": 8.0}],
    )
    lr_ratio: Rate = Field(
        1.0, description="LoRA+: learning rate of B over that of A", examples=[16.0]
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        preset = ADAPTER_PRESETS.get(str(data.get("preset"))) if isinstance(data, dict) else None
        if preset is None:
            return data
        if data.get("kind") != preset.settings["kind"]:
            raise ValueError(
                f"preset {data['preset']} is of kind {preset.settings['kind']}, and kind is "
                f"{data.get('kind')}; write the preset's kind, or leave the preset out"
            )
        return {**preset.settings, **data}

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

    def of(self, path: str) -> Self:
        """For one module: with its rank and its alpha."""
        found = {
            "rank": _first(self.rank_pattern, path, self.rank),
            "alpha": _first(self.alpha_pattern, path, self.alpha),
        }
        return self.model_copy(update=found)

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
        ranks = {pattern: min(own, SMALL_RANK) for pattern, own in self.rank_pattern.items()}
        fields = {"rank": rank, "alpha": self.alpha * factor, "start": "new"}
        fields["rank_pattern"] = ranks
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

    model_config = shown(kind="dora", preset="dora_paper")

    kind: Literal["dora"]


class BottleneckConfig(AdapterConfig):
    """A small network in each block: ``s (up act(down x + b) + c)``, near zero at the start.

    Houlsby et al. 2019 (sequential; section 2.1, near-identity by weights of deviation 0.01),
    He et al. 2022 (parallel; section 3.3, scaled by 4).
    """

    merges: ClassVar[bool] = False

    kind: Literal["bottleneck"]
    placement: Literal["sequential", "parallel"] = Field(
        "sequential",
        description="sequential: behind attention and behind the MLP, of what they give; parallel: "
        "beside the MLP, of what it is given",
    )
    size: PositiveInt = Field(64, description="features between the two products")
    activation: Literal["relu", "gelu"] = Field("relu", description="between the two products")
    scale: PositiveFloat | None = Field(
        None, description="null: 1 if sequential, 4 if parallel", examples=[1.0]
    )
    init_std: PositiveFloat = Field(0.01, description="of both products' initial weights")

    @property
    def scaling(self) -> float:
        """What the network's result is multiplied by."""
        if self.scale is not None:
            return self.scale
        return 1.0 if self.placement == "sequential" else 4.0

    def shrunk(self) -> Self:
        """See `AdapterConfig`."""
        # As much is left over by the ranks that share its features.
        size = min(self.size, SMALL_SIZE + self.size % SMALL_SIZE)
        return self.model_copy(update={"size": size, "start": "new"})
