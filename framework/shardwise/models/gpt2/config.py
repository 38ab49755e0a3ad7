"""Config of GPT-2."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shardwise.config.schema import BelowOne, Epsilon, SeqLen
from shardwise.models.common.config import DecoderConfig, Width


class GPT2Config(DecoderConfig):
    """A decoder with layer norm, learned positions, biases and GELU."""

    family: Literal["gpt2"] = "gpt2"
    max_seq_len: SeqLen = 1024
    ffn_size: Width | None = Field(None, description="null: 4 * hidden_size", examples=[3072])
    norm_eps: Epsilon = Field(1e-5, description="added to the variance in norms")
    embed_dropout: BelowOne = Field(0.0, description="behind the embeddings", examples=[0.1])
    attn_dropout: BelowOne = Field(0.0, description="of attention's weights", examples=[0.1])
    dropout: BelowOne = Field(
        0.0, description="after attention and after the feed-forward", examples=[0.1]
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> GPT2Config:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_heads "
                f"({self.num_heads})"
            )
        return self

    @property
    def ffn_width(self) -> int:
        """Features of the feed-forward."""
        return self.ffn_size or 4 * self.hidden_size

    def param_counts(self) -> dict[str, int]:
        """See `DecoderConfig.param_counts`; positions count as embedding."""
        d, f = self.hidden_size, self.ffn_width
        attention = 4 * (d * d + d)
        return {
            "embedding": (self.vocab_size + self.max_seq_len) * d,
            "layers": self.num_layers * (attention + 2 * d * f + f + d + 4 * d),
            "norm": 2 * d,
            "head": 0 if self.tie_embeddings else self.head_size * d,
        }
