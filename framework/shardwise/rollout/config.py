"""What a recipe says about generation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from shardwise.config.schema import NonNegativeInt, Section, SeqLen
from shardwise.memory.serving import PAGE

MAX_SLOTS = 128


class Sampling(Section):
    """How tokens are chosen and when a completion ends."""

    temperature: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        1.0, description="divides the logits; also when greedy", examples=[0.7]
    )
    greedy: bool = Field(False, description="the most probable token; no randomness")
    top_k: NonNegativeInt = Field(
        0, description="keep the k most probable tokens; 0: all", examples=[50]
    )
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="keep the smallest set of this mass", examples=[0.95]
    )
    max_new_tokens: SeqLen = Field(64, description="longest completion, in tokens")
    stop_ids: tuple[NonNegativeInt, ...] = Field(
        (),
        description="tokens that end a completion, besides the tokenizer's end of text",
        examples=[[2]],
    )
    stop_strings: tuple[str, ...] = Field(
        (), description="texts that end a completion", examples=[["\n\n"]]
    )

    def stopping_at(self, stop_ids: Iterable[int]) -> Sampling:
        """The same, with the tokenizer's ``stop_ids`` behind those that the user gave."""
        both = dict.fromkeys([*self.stop_ids, *stop_ids])
        return self.model_copy(update={"stop_ids": tuple(both)})

    @property
    def filters(self) -> bool:
        """Whether the distribution is cut before sampling."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0)


class RolloutConfig(Section):
    """Who generates a stage's completions, and in how much memory."""

    tp: Annotated[int, Field(ge=1, le=1024)] = Field(
        1,
        description="neighbouring ranks that share one generator: each has some heads of the model "
        "and of the cache; needs as many ranks, or a multiple",
        examples=[2],
    )
    max_slots: Annotated[int, Field(ge=1, le=2**20)] = Field(
        MAX_SLOTS, description="completions that a generator writes at a time, at most"
    )
    max_cache_tokens: Annotated[int, Field(ge=PAGE, le=2**40)] | None = Field(
        None,
        description="tokens that a generator caches, at most; null: as many as it needs",
        examples=[65536],
    )

    def shrunk(self) -> RolloutConfig:
        """For `shardwise.verify`: nothing small needs the bound of the cache, but rows may be
        longer than it.
        """
        return self.model_copy(update={"max_cache_tokens": None})

    def on(self, world_size: int) -> RolloutConfig:
        """The same on so many ranks; where they cannot be shared out so, each generates alone."""
        return self if world_size % self.tp == 0 else self.model_copy(update={"tp": 1})
