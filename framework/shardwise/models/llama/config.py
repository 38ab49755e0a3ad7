"""Config of the Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shardwise.config.schema import (
    BelowOne,
    Epsilon,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from shardwise.models.common.config import DecoderConfig, Width
from shardwise.ops.rope_scaling import RopeScaling


class RopeScalingConfig(Section):
    """Stretching of the rotary frequencies; see `shardwise.ops.rope_scaling.RopeScaling`."""

    kind: Literal["linear", "llama3", "yarn"] = Field(description="which rule")
    factor: Annotated[float, Field(ge=1.0, le=1e6)] = Field(
        description="longer rows over those of pre-training", examples=[4.0]
    )
    original_max_seq_len: PositiveInt = Field(8192, description="tokens of a row in pre-training")
    low_freq_factor: PositiveFloat = Field(1.0, description="llama3")
    high_freq_factor: PositiveFloat = Field(4.0, description="llama3")
    beta_fast: PositiveFloat = Field(32.0, description="yarn")
    beta_slow: PositiveFloat = Field(1.0, description="yarn")
    attention_factor: PositiveFloat | None = Field(
        None, description="yarn; null: from factor", examples=[1.1]
    )

    @model_validator(mode="after")
    def _bands_are_apart(self) -> RopeScalingConfig:
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must exceed low_freq_factor")
        if self.kind == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError("beta_fast must exceed beta_slow")
        return self


class LlamaConfig(DecoderConfig):
    """A decoder with RMS norm, rotary positions, grouped-query attention and SwiGLU."""

    family: Literal["llama"] = "llama"
    num_kv_heads: Width = Field(
        description="key/value heads; as many as num_heads: no grouping", examples=[2]
    )
    head_dim: Width | None = Field(None, description="null: hidden_size / num_heads", examples=[64])
    ffn_size: Width = Field(description="features of the feed-forward", examples=[448])
    rope_base: Annotated[float, Field(ge=1.0, le=1e12)] = Field(
        10_000.0, description="base of the rotary wavelengths, theta"
    )
    rope_scaling: RopeScalingConfig | None = None
    norm_eps: Epsilon = Field(1e-5, description="added to the mean square in norms")
    qkv_bias: bool = Field(False, description="Qwen2: true")
    o_bias: bool = Field(False, description="bias of attention's output")
    qk_norm: bool = Field(False, description="Qwen3: true")
    sliding_window: PositiveInt | None = Field(
        None, description="tokens seen, itself included", examples=[4096]
    )
    window_start_layer: NonNegativeInt = Field(
        0, description="first layer that uses the window", examples=[2]
    )
    dropout: BelowOne = Field(
        0.0, description="after attention and after the feed-forward", examples=[0.1]
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> LlamaConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_heads "
                f"({self.num_heads}), or set head_dim"
            )
        if self.head_width % 2:
            raise ValueError(f"head_dim ({self.head_width}) must be even for rotary positions")
        return self

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rope(self) -> RopeScaling | None:
        """The scaling as the rotary op takes it."""
        return RopeScaling(**self.rope_scaling.model_dump()) if self.rope_scaling else None

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer, None for full attention."""
        return self.sliding_window if layer >= self.window_start_layer else None

    def param_counts(self) -> dict[str, int]:
        """See `DecoderConfig.param_counts`."""
        d, f = self.hidden_size, self.ffn_size
        q, kv = self.num_heads * self.head_width, self.num_kv_heads * self.head_width
        attention = 2 * d * q + 2 * d * kv
        attention += (q + 2 * kv) * self.qkv_bias + d * self.o_bias
        attention += 2 * self.head_width * self.qk_norm
        return {
            "embedding": self.vocab_size * d,
            "layers": self.num_layers * (attention + 3 * d * f + 2 * d),
            "norm": d,
            "head": 0 if self.tie_embeddings else self.head_size * d,
        }
