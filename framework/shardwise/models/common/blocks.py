"""The parts that decoder families share: norm, attention, feed-forward, residual block.

Every block takes ``(x_BTD, context)``. The context is computed once per forward pass by the model
(masks, rotary tables, rng keys), so a block holds no state but its parameters, and all blocks of a
model compile to one graph. It is not a pytree on purpose: FSDP2 casts floating-point tensors that
it finds in a block's arguments, and rotary tables must stay fp32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.models.common.cache import KVCache
from shardwise.models.common.spec import LayerSpec, NormSpec
from shardwise.ops.attention import attention
from shardwise.ops.dropout import dropout
from shardwise.ops.rms_norm import rms_norm
from shardwise.ops.rope import rotate
from shardwise.ops.swiglu import swiglu

# Shape suffixes: B sequences, T tokens, S keys, D model width, H query heads, G key/value heads,
# K head width, R = K / 2 rotated pairs, F feed-forward width.

_ATTENTION_SALT, _AFTER_ATTENTION_SALT, _AFTER_MLP_SALT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Context:
    """What a block needs besides its input."""

    mask: Any  # what `Attention.core` takes: `ops.attention.Mask` for the plain one
    rope: tuple[Tensor, Tensor] | None = None  # cos and sin, BTR
    query_scale_B1T1: Tensor | None = None  # of queries by their positions; None: one
    rng_keys_BT: Tensor | None = None  # keys of this layer; None: no dropout
    cache: KVCache | None = None
    layer: int = 0  # read only with a cache, so that compiled blocks do not depend on it


def is_exactly(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a module computes what one of these classes does: no subclass, no forward of its own.

    What replaces a module by something faster, cut or quantised asks this first.
    """
    return type(module) in kinds and "forward" not in vars(module)


class Dropout(nn.Module):
    """Dropout as a module, so that tables can swap it; see `ops.dropout`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_BTD: Tensor, rng_keys_BT: Tensor | None, salt: int) -> Tensor:
        """BTD to BTD; ``rng_keys_BT`` None turns it off."""
        return dropout(x_BTD, self.p, rng_keys_BT, salt)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale: its weight, or one more than its weight."""

    def __init__(self, num_features: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.eps, self.plus_one = eps, plus_one
        self.weight = nn.Parameter(
            torch.zeros(num_features) if plus_one else torch.ones(num_features)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self.eps, self.plus_one)


class LayerNormPlusOne(nn.LayerNorm):
    """A layer norm whose scale is one more than its weight (Nemotron)."""

    plus_one = True

    def __init__(self, num_features: int, eps: float, bias: bool) -> None:
        super().__init__(num_features, eps, bias=bias)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return layer_norm_plus_one(x, self.weight, self.bias, self.eps)


def layer_norm_plus_one(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension. One and the weight are summed here, for every layout alike."""
    return F.layer_norm(x, weight.shape, weight + 1.0, bias, eps)


def make_norm(spec: NormSpec, num_features: int) -> nn.Module:
    """The norm that a spec asks for."""
    if spec.kind == "layer":
        if spec.plus_one:
            return LayerNormPlusOne(num_features, spec.eps, spec.bias)
        return nn.LayerNorm(num_features, spec.eps, bias=spec.bias)
    return RMSNorm(num_features, spec.eps, spec.plus_one)


class Sinks(nn.Module):
    """A score a head that takes part in the softmax, and to which no value belongs.

    A module, so that tensor parallelism cuts it as it does other parts.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads))

    def forward(self) -> Tensor:
        """The scores of the heads that are held here."""
        return self.weight


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, and the switches of `LayerSpec`.

    The numbers of heads are read from the projections' outputs, so that a swapped, head-parallel
    projection needs no change here.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        d, width = spec.hidden_size, spec.head_width
        heads, kv_heads = spec.num_heads, spec.kv_heads
        self.head_dim = width
        self.dropout = spec.attn_dropout
        # Kernels divide scores by the root of the width; any other scale is put into the queries.
        self.q_scale = 1.0 if spec.attn_scale is None else spec.attn_scale * math.sqrt(width)
        self.soft_cap = spec.attn_soft_cap
        self.interleaved = spec.rope is not None and spec.rope.interleaved
        self.norms_heads = spec.qk_norm == "head"  # else the whole projection
        self.head_offset = 0  # global index of the first query head held here
        self.core: Callable[..., Tensor] = attention  # swapped by context parallelism
        self.q = nn.Linear(d, heads * width, bias=spec.qkv_bias)
        self.k = nn.Linear(d, kv_heads * width, bias=spec.qkv_bias)
        self.v = nn.Linear(d, kv_heads * width, bias=spec.qkv_bias)
        self.o = nn.Linear(heads * width, d, bias=spec.o_bias)
        self.q_norm = self.k_norm = None
        if spec.qk_norm is not None:
            share = width if self.norms_heads else 0
            self.q_norm = make_norm(spec.norm, share or heads * width)
            self.k_norm = make_norm(spec.norm, share or kv_heads * width)
        self.sinks = Sinks(heads) if spec.sinks else None

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Attend; returns BTD."""
        q_BHTK = self._heads(self.q(x_BTD), self.q_norm)
        k_BGSK = self._heads(self.k(x_BTD), self.k_norm)
        v_BGSK = self._heads(self.v(x_BTD), None)
        if context.rope is not None:
            q_BHTK = rotate(q_BHTK, *context.rope, self.interleaved)
            k_BGSK = rotate(k_BGSK, *context.rope, self.interleaved)
        if self.q_scale != 1.0:
            q_BHTK = q_BHTK * self.q_scale
        if context.query_scale_B1T1 is not None:
            q_BHTK = q_BHTK * context.query_scale_B1T1
        if context.cache is not None:
            k_BGSK, v_BGSK = context.cache.update(context.layer, k_BGSK, v_BGSK)
        # Named only where they are: a core that has not been told of them fails, and guesses not.
        options: dict[str, Any] = {}
        if self.soft_cap is not None:
            options["soft_cap"] = self.soft_cap
        if self.sinks is not None:
            options["sinks_H"] = self.sinks()
        out_BHTK = self.core(
            q_BHTK,
            k_BGSK,
            v_BGSK,
            context.mask,
            dropout_p=self.dropout,
            rng_keys_BT=context.rng_keys_BT,
            salt=_ATTENTION_SALT,
            head_offset=self.head_offset,
            **options,
        )
        return self.o(out_BHTK.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """A projection's output (B, T, features), normed, as (B, heads, T, K)."""
        if norm is not None and not self.norms_heads:
            x = norm(x)
        x_BTHK: Tensor = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.norms_heads:
            x_BTHK = norm(x_BTHK)
        return x_BTHK.transpose(1, 2)


class SwiGLU(nn.Module):
    """Gated feed-forward of the Llama family."""

    def __init__(self, hidden_size: int, ffn_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.up = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.down = nn.Linear(ffn_size, hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """BTD to BTD."""
        return self.down(swiglu(self.gate(x_BTD), self.up(x_BTD)))  # type: ignore[no-any-return]


class GeGLU(SwiGLU):
    """Gated feed-forward of the Gemma family: the tanh form of GELU in place of SiLU."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """BTD to BTD."""
        gate = F.gelu(self.gate(x_BTD), approximate="tanh")
        return self.down(gate * self.up(x_BTD))  # type: ignore[no-any-return]


class GeluMLP(nn.Module):
    """Feed-forward of GPT-2: biases and the tanh form of GELU."""

    def __init__(self, hidden_size: int, ffn_size: int, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.down = nn.Linear(ffn_size, hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """BTD to BTD."""
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))  # type: ignore[no-any-return]


class ExactGeluMLP(GeluMLP):
    """The same with GELU itself, not its tanh form."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """BTD to BTD."""
        return self.down(F.gelu(self.up(x_BTD)))  # type: ignore[no-any-return]


class ReluSquaredMLP(GeluMLP):
    """The same with the square of ReLU (So et al. 2021, "Primer")."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """BTD to BTD."""
        return self.down(F.relu(self.up(x_BTD)).square())  # type: ignore[no-any-return]


# Feed-forwards, by whether they are gated and by their activation.
MLPS: dict[tuple[bool, str], type[SwiGLU | GeluMLP]] = {
    (True, "silu"): SwiGLU,
    (True, "gelu_tanh"): GeGLU,
    (False, "gelu_tanh"): GeluMLP,
    (False, "gelu"): ExactGeluMLP,
    (False, "relu_squared"): ReluSquaredMLP,
}


_BEHIND = ("around", "after")  # `LayerSpec.norms` with norms behind branches


class Block(nn.Module):
    """Residual block: ``x + norm(attn(norm(x)))``, then ``x + norm(mlp(norm(x)))``.

    A block has both norms of a branch or one of them. One that is not there in front is an
    `Identity`, where tensor parallelism enters; one that is not there behind is None. A parallel
    block is ``x + attn(norm(x)) + mlp(norm(x))``, with two norms, or a shared one: ``mlp_norm`` is
    None then.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        d, before, behind = spec.hidden_size, spec.norms != "after", spec.norms in _BEHIND

        def norm(there: bool) -> nn.Module | None:
            return make_norm(spec.norm, d) if there else None

        self.attn_norm: nn.Module = norm(before) or nn.Identity()
        self.attn = Attention(spec)
        self.attn_post_norm = norm(behind)
        shared = spec.norms == "shared"
        self.mlp_norm = None if shared else norm(before) or nn.Identity()
        mlp = MLPS[spec.gated, spec.activation]
        self.mlp = mlp(d, spec.ffn_size, bias=spec.mlp_bias)
        self.mlp_post_norm = norm(behind)
        self.drop = Dropout(spec.dropout)
        self.residual_scale, self.parallel = spec.residual_scale, spec.parallel

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """BTD to BTD."""
        keys_BT = context.rng_keys_BT
        read_BTD, normed_BTD = x_BTD, self.attn_norm(x_BTD)
        branch = self.attn(normed_BTD, context)
        x_BTD = self._add(x_BTD, branch, self.attn_post_norm, keys_BT, _AFTER_ATTENTION_SALT)
        if self.mlp_norm is not None:
            normed_BTD = self.mlp_norm(read_BTD if self.parallel else x_BTD)
        branch = self.mlp(normed_BTD)
        return self._add(x_BTD, branch, self.mlp_post_norm, keys_BT, _AFTER_MLP_SALT)

    def _add(
        self,
        x_BTD: Tensor,
        branch_BTD: Tensor,
        norm: nn.Module | None,
        rng_keys_BT: Tensor | None,
        salt: int,
    ) -> Tensor:
        """A branch, added to the residual stream."""
        if norm is not None:
            branch_BTD = norm(branch_BTD)
        branch_BTD = self.drop(branch_BTD, rng_keys_BT, salt)
        if self.residual_scale != 1.0:
            branch_BTD = branch_BTD * self.residual_scale
        return x_BTD + branch_BTD
