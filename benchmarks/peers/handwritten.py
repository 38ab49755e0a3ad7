"""The training loop one would write by hand: one file, one process, the whole model compiled.

Llama's architecture with tied embeddings, PyTorch's own norm, attention, cross-entropy, clipping
and fused AdamW. Two ways to train in bf16; whichever is faster is the peer. One in fp32.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model and of one step's batch."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    batch: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.seq_len


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        d = s.hidden_size
        self.heads, self.kv_heads, self.width = s.num_heads, s.num_kv_heads, d // s.num_heads
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, self.kv_heads * self.width, bias=False)
        self.v = nn.Linear(d, self.kv_heads * self.width, bias=False)
        self.o = nn.Linear(d, d, bias=False)
        self.gate = nn.Linear(d, s.ffn_size, bias=False)
        self.up = nn.Linear(d, s.ffn_size, bias=False)
        self.down = nn.Linear(s.ffn_size, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, d = x.shape
        y = self.norm1(x)
        q = self.q(y).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.k(y).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        v = self.v(y).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        )
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, d))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Embedding, layers, norm, tied head; returns the mean cross-entropy."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(s.vocab_size, s.hidden_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_layers))
        self.norm = nn.RMSNorm(s.hidden_size, eps=1e-5)
        width = s.hidden_size // s.num_heads
        angle = torch.outer(torch.arange(s.seq_len), 1e4 ** -(torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, the halves of a head as pairs, in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Loop:
    """``step(ids, targets)``: one update, returning the loss.

    ``autocast`` keeps fp32 weights and casts in the graph; ``masters`` computes with bf16 weights
    and updates an fp32 copy.
    """

    def __init__(
        self, shape: Shape, kind: Literal["autocast", "masters", "fp32"], compile: bool
    ) -> None:
        self.kind = kind
        self.model = Model(shape)
        self.masters = list(self.model.parameters())
        if kind == "masters":
            self.masters = [p.detach().clone().requires_grad_() for p in self.masters]
            for p in self.model.parameters():
                p.data = p.data.bfloat16()
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.loss = torch.compile(self.model, fullgraph=True) if compile else self.model

    def step(self, ids: Tensor, targets: Tensor) -> float:
        """One update."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.kind == "autocast"):
            loss = self.loss(ids, targets)
        loss.backward()
        parameters = list(self.model.parameters())
        if self.kind == "masters":
            for master, p in zip(self.masters, parameters, strict=True):
                master.grad, p.grad = p.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.kind == "masters":
            with torch.no_grad():
                torch._foreach_copy_(parameters, self.masters)
        return loss.item()
