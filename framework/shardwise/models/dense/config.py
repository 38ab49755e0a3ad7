"""What the configs of dense families share: keys, and how a `ModelSpec` is made of them.

A family's config has the keys in which its releases differ; what all of them do alike it says to
`make_spec`. So a recipe cannot ask a family for what no class of its computes.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.schema import BelowOne, Epsilon, PositiveInt
from shardwise.models.common.config import DecoderConfig, Width
from shardwise.models.common.spec import LayerSpec, ModelSpec, NormSpec
from shardwise.models.dense.rope import AsTuple, RopeScalingConfig
from shardwise.ops.rope_scaling import RopeSpec

Base = Annotated[float, Field(ge=1.0, le=1e12)]
LayerType = Literal["full", "window"]
LayerTypes = Annotated[tuple[LayerType, ...], Field(min_length=1), AsTuple]
_MODEL_SWITCHES = ("embed_scale", "logit_scale", "logit_soft_cap")


class DenseConfig(DecoderConfig):
    """A decoder with rotary positions and grouped-query attention."""

    interleaved: ClassVar[bool] = False  # rotated pairs are neighbours, see `RopeSpec`

    num_kv_heads: Width = Field(
        description="key/value heads; as many as num_heads: no grouping", examples=[2]
    )
    head_dim: Width | None = Field(None, description="null: hidden_size / num_heads", examples=[64])
    ffn_size: Width = Field(description="features of the feed-forward", examples=[448])
    rope_base: Base = Field(10_000.0, description="base of the rotary wavelengths, theta")
    rope_scaling: RopeScalingConfig | None = None
    norm_eps: Epsilon = Field(1e-5, description="added to the mean square in norms")
    sliding_window: PositiveInt | None = Field(
        None, description="tokens seen, itself included", examples=[4096]
    )
    dropout: BelowOne = Field(
        0.0, description="after attention and after the feed-forward", examples=[0.1]
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
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
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.max_seq_len, self.rope().width)
        return self

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`; of a family with switches of its own, that says them."""
        return self.make_spec()

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    def types(self) -> list[LayerType]:
        """The attention of every layer."""
        pattern: tuple[LayerType, ...] = getattr(self, "layer_types", None) or ("window",)
        return [pattern[i % len(pattern)] for i in range(self.num_layers)]

    def windows(self) -> list[int | None]:
        """The sliding window of every layer, None for full attention."""
        return [self.sliding_window if type_ == "window" else None for type_ in self.types()]

    def ropes(self) -> list[RopeSpec | None]:
        """The rotary positions of every layer, None for none."""
        return [self.rope()] * self.num_layers

    def rope(self) -> RopeSpec:
        """By ``rope_base`` and ``rope_scaling``."""
        said = self.rope_scaling
        scaling = None if said is None else said.scaling(self.max_seq_len)
        return RopeSpec(
            width=self.head_width,
            base=self.rope_base,
            scaling=scaling,
            interleaved=self.interleaved,
        )

    def make_spec(self, norm: NormSpec | None = None, **switches: Any) -> ModelSpec:
        """The spec of these keys; ``switches`` are fields of `LayerSpec` and `ModelSpec`."""
        norm = norm or NormSpec(eps=self.norm_eps)
        of_model = {k: switches.pop(k) for k in _MODEL_SWITCHES if k in switches}
        pairs = list(zip(self.windows(), self.ropes(), strict=True))
        layers = {
            (window, rope): LayerSpec(
                hidden_size=self.hidden_size,
                num_heads=self.num_heads,
                kv_heads=self.kv_heads,
                head_width=self.head_width,
                ffn_size=self.ffn_size,
                norm=norm,
                window=window,
                rope=rope,
                dropout=self.dropout,
                **switches,
            )
            for window, rope in set(pairs)
        }
        return ModelSpec(
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            head_size=self.head_size,
            tied=self.tie_embeddings,
            layers=tuple(layers[pair] for pair in pairs),
            norm=norm,
            **of_model,
        )

    def with_layers(self, number: int) -> Self:
        """See `DecoderConfig.with_layers`."""
        updates: dict[str, Any] = {"num_layers": number}
        for key in PATTERNS:
            if (pattern := getattr(self, key, None)) is not None:
                updates[key] = shortened(pattern, self.num_layers, number)
        return self.model_copy(update=updates)

    def with_widths(self, hidden_size: int, head_width: int) -> Self:
        """See `DecoderConfig.with_widths`."""
        said = self.head_dim is not None or hidden_size != self.num_heads * head_width
        updates = {"hidden_size": hidden_size, "head_dim": head_width if said else None}
        made = self.model_copy(update=updates)
        if (scaling := self.rope_scaling) is None:
            return made
        fitting = scaling.for_pairs(made.rope().width // 2)
        return made.model_copy(update={"rope_scaling": fitting})

    def with_window(self, window: int) -> Self:
        """See `DecoderConfig.with_window`."""
        return self.model_copy(update={"sliding_window": window})


# Keys whose values are repeated over the layers.
PATTERNS = ("layer_types", "rope_layers", "rope_bases")


class BiasedConfig(DenseConfig):
    """What families have that may have biases in attention."""

    qkv_bias: bool = Field(False, description="biases of queries, keys and values")
    o_bias: bool = Field(False, description="bias of attention's output")


def shortened(pattern: tuple[Any, ...], layers: int, number: int) -> tuple[Any, ...]:
    """A pattern for fewer layers that has each of its values, in order, while there is room."""
    whole = [pattern[i % len(pattern)] for i in range(layers)]
    if set(whole[:number]) == set(whole):
        return pattern
    runs = [v for i, v in enumerate(whole) if i == 0 or v != whole[i - 1]]
    return tuple(dict.fromkeys(whole)) if len(runs) > number else tuple(runs)
