"""What every decoder family's config answers, so that rooms above need not know the family."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.schema import ModelConfig
from shardwise.config.section import beside

Width = Annotated[int, Field(ge=1, le=2**20)]


class DecoderConfig(ModelConfig):
    """Sizes common to decoder-only families."""

    hidden_size: Width = Field(description="features of a token", examples=[256])
    num_layers: Annotated[int, Field(ge=1, le=10_000)] = Field(
        description="blocks, one above the other", examples=[4]
    )
    num_heads: Width = Field(description="query heads of attention", examples=[8])
    tie_embeddings: bool = Field(True, description="the head is the embedding's matrix")
    head: Literal["vocabulary", "scalar"] = Field(
        "vocabulary",
        description="scalar: one number a token, as reward models and critics have",
        json_schema_extra=beside(tie_embeddings=False),
    )

    @model_validator(mode="after")
    def _scalar_is_not_tied(self) -> Self:
        if self.head == "scalar" and self.tie_embeddings:
            raise ValueError("head scalar cannot be tied; set tie_embeddings: false")
        return self

    def as_scalar(self) -> Self:
        """The same decoder with a scalar head."""
        return self.model_copy(update={"head": "scalar", "tie_embeddings": False})

    def without_dropout(self) -> Self:
        """The same decoder, without dropout."""
        return self.model_copy(update={k: 0.0 for k in type(self).model_fields if "dropout" in k})

    @property
    def head_size(self) -> int:
        """Outputs of the head."""
        return 1 if self.head == "scalar" else self.vocab_size

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_heads

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_heads

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer, None for full attention."""
        return None

    def param_counts(self) -> dict[str, int]:
        """Parameters by part: ``embedding``, ``layers`` (all), ``norm`` (the last), ``head``.

        They add up to the model's parameters; a tied head counts as 0.
        """
        raise NotImplementedError

    def num_parameters(self) -> int:
        """All parameters."""
        return sum(self.param_counts().values())

    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: no input embedding, the head always.

        This is N in the 6N rule for FLOPs a token (norm weights and biases are counted too; they
        are under 0.1 % of a model of any use).
        """
        counts = self.param_counts()
        return counts["layers"] + counts["norm"] + self.head_size * self.hidden_size
