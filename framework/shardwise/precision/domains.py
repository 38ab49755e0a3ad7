"""The scaling domains of a layout, emulated on one rank.

A rank scales what it holds: its columns or rows of a weight, its features of an activation, its
tokens. So one process that cuts each product as a layout's ranks would, quantises every part by
itself and puts the results together, computes with that layout's scales. Data ranks, ZeRO and
pipelines have domains of their own only through micro-batches, which the caller keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from shardwise.ops.fp8_linear import Site
from shardwise.ops.linear import Accumulate
from shardwise.parallel.context import token_index
from shardwise.parallel.layout import Layout
from shardwise.parallel.quantised import Quantised
from shardwise.parallel.tensor import Matmul

# Shape suffixes: B sequences, T tokens, I input and O output features.


class Domains:
    """How the ranks of ``layout`` cut products."""

    def __init__(self, layout: Layout, kv_heads: int) -> None:
        self.layout, self.kv_heads = layout, kv_heads

    def linear(self, layer: Quantised, site: Site) -> Matmul:
        """A product in parts; each part is a site of its own that shares the layer's memory."""
        parts = [self._part(site, i) for i in range(self.layout.cp * self.layout.tp)]

        def multiply(x_BTI: Tensor, weight_OI: Tensor, add: Accumulate | None) -> Tensor:
            assert add is None, "domains are emulated without a pipeline"
            for part in parts:
                part.follow(site)
            rows = [
                self._over_features(layer, x, weight_OI, parts[c * self.layout.tp :])
                for c, x in enumerate(self._tokens(x_BTI))
            ]
            return self._join(rows, x_BTI.shape[1])

        return multiply

    def _part(self, site: Site, number: int) -> Site:
        part = copy.copy(site)
        part.part = number
        return part

    def _tokens(self, x_BTI: Tensor) -> Iterator[Tensor]:
        """What each context rank holds."""
        cp = self.layout.cp
        if cp == 1:
            yield x_BTI
            return
        for index_t in self._index(x_BTI.shape[1]):
            yield x_BTI[:, index_t]

    def _index(self, num_tokens: int) -> list[Tensor]:
        cp, kind = self.layout.cp, self.layout.cp_kind
        return [token_index(num_tokens, cp, rank, kind) for rank in range(cp)]

    def _join(self, rows: list[Tensor], num_tokens: int) -> Tensor:
        if self.layout.cp == 1:
            return rows[0]
        return torch.cat(rows, dim=1)[:, torch.cat(self._index(num_tokens)).argsort()]

    def _over_features(
        self, layer: Quantised, x_BTI: Tensor, weight_OI: Tensor, parts: list[Site]
    ) -> Tensor:
        tp = self.layout.tp
        if tp == 1 or layer.style not in ("column", "kv", "row"):
            return parts[0].linear(x_BTI, weight_OI, None)
        if layer.style == "row":
            cut = zip(parts, x_BTI.chunk(tp, dim=-1), weight_OI.chunk(tp, dim=1))
            return torch.stack([p.linear(x, w, None) for p, x, w in cut]).sum(0)
        if layer.style == "kv" and self.kv_heads < tp:
            # Ranks that share a head each feed it to query heads of their own: as many heads as
            # ranks come out, and attention groups its queries by that number.
            width = weight_OI.shape[0] // self.kv_heads
            starts = [rank * self.kv_heads // tp * width for rank in range(tp)]
            weights = [weight_OI.narrow(0, start, width) for start in starts]
        else:
            weights = list(weight_OI.chunk(tp, dim=0))
        return torch.cat([p.linear(x_BTI, w, None) for p, w in zip(parts, weights)], dim=-1)
