"""Rotary positions of families that rotate the first features of a head alone."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from shardwise.models.dense.config import DenseConfig
from shardwise.models.dense.release import ROPE_WORDS, Fields, Part, Raw
from shardwise.models.dense.rope import rope_of, scaling_from_hf, scaling_to_hf
from shardwise.ops.rope_scaling import RopeSpec

PARTIAL = "partial_rotary_factor"


class PartialConfig(DenseConfig):
    """A decoder of whose heads the first features alone may be rotated."""

    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="share of a head's features that is rotated", examples=[0.75]
    )

    @model_validator(mode="after")
    def _rotation_fits(self) -> Self:
        width = self.rope().width
        if width < 2 or width % 2:
            raise ValueError(
                f"partial_rotary_factor ({self.partial_rotary_factor}) rotates {width} of "
                f"{self.head_width} features of a head; their number must be even"
            )
        return self

    def rope(self) -> RopeSpec:
        """See `DenseConfig.rope`."""
        rope = super().rope()
        return dataclasses.replace(rope, width=int(rope.width * self.partial_rotary_factor))

    def with_widths(self, hidden_size: int, head_width: int) -> Self:
        """See `DecoderConfig.with_widths`; an even number of features is rotated."""
        rotated = 2 * max(1, int(head_width * self.partial_rotary_factor / 2))
        share = min(1.0, (rotated + 0.5) / head_width)  # of which the whole part counts
        made = self.model_copy(update={PARTIAL: share})
        return super(PartialConfig, made).with_widths(hidden_size, head_width)


def partial_rope(share: float, base_word: str = "rope_theta", share_word: str = PARTIAL) -> Part:
    """`dense.rope.ROPE`, and the share of a head, which is ``share`` where nothing is said.

    ``base_word`` and ``share_word``: a class's own keys, where they are others.
    """

    def read(raw: Raw) -> Fields:
        rope = rope_of(raw)
        base, part = raw.get(base_word, raw["rope_theta"]), raw.get(share_word, share)
        said = {"rope_theta": base, PARTIAL: part} | rope
        return {
            "rope_base": float(said["rope_theta"]),
            PARTIAL: said[PARTIAL],
            "rope_scaling": scaling_from_hf(rope, raw),
        }

    def write(c: Any) -> Fields:
        scaling = scaling_to_hf(c.rope_scaling)
        return {
            base_word: c.rope_base,
            share_word: c.partial_rotary_factor,
            "rope_scaling": scaling,
        }

    return Part((*ROPE_WORDS, PARTIAL, base_word, share_word), read, write)
