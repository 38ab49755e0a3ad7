"""The parts that decoder families share: norm, attention, feed-forward, pre-norm block.

Every block takes ``(x_BTD, context)``. The context is computed once per forward pass by the model
(masks, rotary tables, rng keys), so a block holds no state but its parameters, and all blocks of a
model compile to one graph. It is not a pytree on purpose: FSDP2 casts floating-point tensors that
it finds in a block's arguments, and rotary tables must stay fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.models.common.cache import KVCache
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
    """Root-mean-square norm with a learned scale."""

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, optional biases and QK-norm.

    The numbers of heads are read from the projections' outputs, so that a swapped, head-parallel
    projection needs no change here.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm_eps: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.head_offset = 0  # global index of the first query head held here
        self.core: Callable[..., Tensor] = attention  # swapped by context parallelism
        self.q = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o = nn.Linear(num_heads * head_dim, hidden_size, bias=o_bias)
        self.q_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Attend; returns BTD."""
        q_BTHK = self.q(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTGK = self.k(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTGK = self.v(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BHTK, k_BGSK, v_BGSK = (t.transpose(1, 2) for t in (q_BTHK, k_BTGK, v_BTGK))
        if context.rope is not None:
            q_BHTK, k_BGSK = rotate(q_BHTK, *context.rope), rotate(k_BGSK, *context.rope)
        if context.cache is not None:
            k_BGSK, v_BGSK = context.cache.update(context.layer, k_BGSK, v_BGSK)
        out_BHTK = self.core(
            q_BHTK,
            k_BGSK,
            v_BGSK,
            context.mask,
            dropout_p=self.dropout,
            rng_keys_BT=context.rng_keys_BT,
            salt=_ATTENTION_SALT,
            head_offset=self.head_offset,
        )
        return self.o(out_BHTK.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Gated feed-forward of the Llama family."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, ffn_size, bias=False)
        self.up = nn.Linear(hidden_size, ffn_size, bias=False)
        self.down = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """BTD to BTD."""
        return self.down(swiglu(self.gate(x_BTD), self.up(x_BTD)))  # type: ignore[no-any-return]


class GeluMLP(nn.Module):
    """Feed-forward of GPT-2: biases and the tanh form of GELU."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, ffn_size)
        self.down = nn.Linear(ffn_size, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """BTD to BTD."""
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm residual block: ``x + attn(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(
        self,
        attn_norm: nn.Module,
        attn: Attention,
        mlp_norm: nn.Module,
        mlp: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attn_norm = attn_norm
        self.attn = attn
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.drop = Dropout(dropout)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """BTD to BTD."""
        rng_keys_BT = context.rng_keys_BT
        branch = self.attn(self.attn_norm(x_BTD), context)
        x_BTD = x_BTD + self.drop(branch, rng_keys_BT, _AFTER_ATTENTION_SALT)
        branch = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + self.drop(branch, rng_keys_BT, _AFTER_MLP_SALT)  # type: ignore[no-any-return]
