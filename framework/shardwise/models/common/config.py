"""What every decoder family's config answers, so that rooms above need not know the family."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.schema import ModelConfig
from shardwise.config.section import beside
from shardwise.models.common.spec import ModelSpec

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

    @property
    def spec(self) -> ModelSpec:
        """What the model is. All else that is asked of a config follows from it."""
        raise NotImplementedError

    def as_scalar(self) -> Self:
        """The same decoder with a scalar head."""
        return self.model_copy(update={"head": "scalar", "tie_embeddings": False})

    def without_dropout(self) -> Self:
        """The same decoder, without dropout."""
        return self.model_copy(update={k: 0.0 for k in type(self).model_fields if "dropout" in k})

    def with_layers(self, number: int) -> Self:
        """The same decoder with so many layers, of each kind that this one has while they last."""
        return self.model_copy(update={"num_layers": number})

    def with_widths(self, hidden_size: int, head_width: int) -> Self:
        """The same decoder with other widths, of heads too where a family's may be said."""
        return self.model_copy(update={"hidden_size": hidden_size})

    def with_window(self, window: int) -> Self:
        """The same decoder, whose layers with a window see so many tokens."""
        return self

    def with_soft_caps(self, scores: float, logits: float) -> Self:
        """The same decoder; where it has soft caps, they are at most these."""
        least = {"attn_soft_cap": scores, "logit_soft_cap": logits}
        had = {key: getattr(self, key, None) for key in least}
        caps = {key: min(cap, least[key]) for key, cap in had.items() if cap is not None}
        return self.model_copy(update=caps)

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

    @property
    def ffn_width(self) -> int:
        """Features of the feed-forward."""
        return self.spec.layer.ffn_size

    def num_parameters(self) -> int:
        """All parameters."""
        return sum(self.spec.param_counts().values())
