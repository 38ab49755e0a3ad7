"""Keys of the plain engine alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.config.schema import EngineConfig, NonNegativeInt, StageConfig
from shardwise.parallel.layout import Layout


class PlainConfig(EngineConfig):
    """One process, whole batches, `torch.optim`: the oracle of ``shardwise verify``."""

    kind: Literal["plain"]
    split: Literal["whole", "rows", "padded", "documents"] = Field(
        "whole",
        description="how batches are cut, which changes nothing: all rows at once, one row at a "
        "time, with more padding, or each document of a packed row by itself",
    )
    domains: str | None = Field(
        None,
        description="scale quantised products as the ranks of this layout would",
        examples=["tp2"],
    )
    skip: list[NonNegativeInt] = Field(
        default=[],
        description="updates, from 0, that leave the weights as they are",
        examples=[[1]],
    )

    def refusal(self, layout: Layout, stage: StageConfig | None = None) -> str | None:
        """See `EngineConfig`."""
        if layout.world == 1:
            return None
        return (
            f"engine.kind: plain computes on 1 rank, and engine.layout {layout} has "
            f"{layout.world}; start fewer, or write kind: native"
        )
