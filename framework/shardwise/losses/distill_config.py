"""Settings of learning from a teacher's distributions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shardwise.config.schema import PositiveFloat, Section


class DivergenceConfig(Section):
    """What the student's distribution of each token is held against the teacher's by."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description="KL(teacher, student), which covers all that the teacher says; KL(student, "
        "teacher), which keeps to what it says most; or what lies between, by beta",
    )
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="jsd: near 0 it goes like forward_kl, near 1 like reverse_kl"
    )
    temperature: PositiveFloat = Field(1.0, description="divides the logits of both")
    top_k: Annotated[int, Field(ge=1, le=2**20)] | None = Field(
        64,
        description="the teacher's likeliest words, beside which all others count as one; null: "
        "the whole vocabulary, word by word",
    )
