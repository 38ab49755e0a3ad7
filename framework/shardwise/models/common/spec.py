"""What a decoder is, as data: the one thing that rooms above ask of a family.

A family's config makes a `ModelSpec` of its keys; the model is built from it, and pipeline split,
memory, FLOPs, init, shrink, checkpoint, rollout and the megatron engine read it. Every switch has a
default that does nothing. So who computes only some of it says what it knows, and asks `beyond`
for the rest: a switch that is added later is refused there until it is known.

No torch here: configs are read without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal

from shardwise.ops.rope_scaling import QueryGrowth, RopeSpec

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A norm of the last dimension."""

    kind: Literal["rms", "layer"] = "rms"  # layer: centred
    eps: float = 1e-5
    plus_one: bool = False  # the weight is what the scale is beyond one (Gemma)
    bias: bool = True  # of kind layer

    def shapes(self, name: str, width: int) -> dict[str, Shape]:
        """Its parameters, by name."""
        found: dict[str, Shape] = {f"{name}.weight": (width,)}
        biased = self.kind == "layer" and self.bias
        return found | ({f"{name}.bias": (width,)} if biased else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: attention, a feed-forward, and the norms around them."""

    hidden_size: int
    num_heads: int
    kv_heads: int
    head_width: int
    ffn_size: int
    norm: NormSpec

    # attention
    window: int | None = None  # tokens that are seen, the query's included; None: all
    rope: RopeSpec | None = None
    attn_scale: float | None = None  # of scores; None: 1 / sqrt(head_width)
    query_growth: QueryGrowth | None = None  # with the position
    attn_soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    sinks: bool = False  # a learned score a head that no value belongs to
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None  # over a head, or over all of them
    attn_dropout: float = 0.0

    # feed-forward
    gated: bool = True
    activation: Literal["silu", "gelu_tanh", "gelu", "relu_squared"] = "silu"
    mlp_bias: bool = False

    # the block
    # Of attention, and of the feed-forward; shared: one in front of both.
    norms: Literal["before", "around", "after", "shared"] = "before"
    parallel: bool = False  # the feed-forward reads what attention reads, and stands beside it
    residual_scale: float = 1.0  # of what is added to the residual stream
    dropout: float = 0.0  # of the same

    @property
    def kind(self) -> str:
        """What layers of one model may differ in, in words."""
        seen = "full attention" if self.window is None else "a window"
        return seen if self.rope is not None else f"{seen} without rotation"

    @property
    def attention_is_plain(self) -> bool:
        """Whether every fused kernel computes its attention: a softmax of scores, and no more."""
        return self.attn_soft_cap is None and not self.sinks

    def shapes(self) -> dict[str, Shape]:
        """Its parameters, by name, in the order of the module's."""
        d, f = self.hidden_size, self.ffn_size
        q, kv = self.num_heads * self.head_width, self.kv_heads * self.head_width
        found: dict[str, Shape] = {}

        def linear(name: str, out: int, into: int, bias: bool) -> None:
            found[f"{name}.weight"] = (out, into)
            if bias:
                found[f"{name}.bias"] = (out,)

        if self.norms != "after":
            found |= self.norm.shapes("attn_norm", d)
        linear("attn.q", q, d, self.qkv_bias)
        linear("attn.k", kv, d, self.qkv_bias)
        linear("attn.v", kv, d, self.qkv_bias)
        linear("attn.o", d, q, self.o_bias)
        if self.qk_norm is not None:
            whole = self.qk_norm == "projection"
            found |= self.norm.shapes("attn.q_norm", q if whole else self.head_width)
            found |= self.norm.shapes("attn.k_norm", kv if whole else self.head_width)
        if self.sinks:
            found["attn.sinks.weight"] = (self.num_heads,)
        behind = self.norms in ("around", "after")
        if behind:
            found |= self.norm.shapes("attn_post_norm", d)
        if self.norms in ("before", "around"):
            found |= self.norm.shapes("mlp_norm", d)
        if self.gated:
            linear("mlp.gate", f, d, self.mlp_bias)
        linear("mlp.up", f, d, self.mlp_bias)
        linear("mlp.down", d, f, self.mlp_bias)
        if behind:
            found |= self.norm.shapes("mlp_post_norm", d)
        return found

    @property
    def num_parameters(self) -> int:
        """All of the layer's."""
        return sum(map(math.prod, self.shapes().values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder: embedding, layers, a norm, a head."""

    hidden_size: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    tied: bool = True
    head_size: int  # outputs of the head

    learned_positions: int | None = None  # rows of an embedding of positions; None: it has none
    embed_scale: float = 1.0
    embed_dropout: float = 0.0
    logit_scale: float = 1.0  # of a vocabulary's; a scalar head has neither this
    logit_soft_cap: float | None = None  # nor that

    @property
    def layer(self) -> LayerSpec:
        """The first layer: of its shapes are all of a dense model."""
        return self.layers[0]

    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers that there are, in the order in which they come."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers))

    def shapes(self) -> dict[str, Shape]:
        """Every parameter's shape, by name and in the order of `named_parameters`."""
        d = self.hidden_size
        found: dict[str, Shape] = {"embed.weight": (self.vocab_size, d)}
        if not self.tied:
            found["head.weight"] = (self.head_size, d)
        if self.learned_positions is not None:
            found["pos_embed.weight"] = (self.learned_positions, d)
        of_layer = {layer: layer.shapes() for layer in set(self.layers)}
        for i, layer in enumerate(self.layers):
            found |= {f"layers.{i}.{name}": shape for name, shape in of_layer[layer].items()}
        return found | self.norm.shapes("norm", d)

    def param_counts(self) -> dict[str, int]:
        """Parameters by part: ``embedding`` (positions too), ``layers`` (all), ``norm``, ``head``.

        They add up to the model's parameters; a tied head counts as 0.
        """
        d = self.hidden_size
        return {
            "embedding": (self.vocab_size + (self.learned_positions or 0)) * d,
            "layers": sum(layer.num_parameters for layer in self.layers),
            "norm": sum(map(math.prod, self.norm.shapes("norm", d).values())),
            "head": 0 if self.tied else self.head_size * d,
        }

    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: no input embedding, the head always.

        This is N in the 6N rule for FLOPs a token (norm weights and biases are counted too; they
        are under 0.1 % of a model of any use).
        """
        counts = self.param_counts()
        return counts["layers"] + counts["norm"] + self.head_size * self.hidden_size


def beyond(part: Any, known: Collection[str]) -> str | None:
    """The first switch of a spec that does something, and is not among the ``known`` fields."""
    for field in dataclasses.fields(part):
        has_default = field.default is not dataclasses.MISSING
        if has_default and field.name not in known and getattr(part, field.name) != field.default:
            return field.name
    return None
