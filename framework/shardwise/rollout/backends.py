"""Who computes logits for the generator: the plain model anywhere, `native.py` on CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardwise.memory.serving import PAGE
from shardwise.models.common.decoder import Decoder
from shardwise.parallel.tensor import widen_logits
from shardwise.rollout import sampling as sampling_
from shardwise.rollout.cache import PagedCache
from shardwise.rollout.config import Sampling
from shardwise.rollout.pages import Cached
from shardwise.rollout.sampling import Choice

MAX_PREFILL_TOKENS = 8192  # padded tokens of one forward pass; bounds its activations

# Shape suffixes: B rows, T tokens, P pages a row, N rows that draw, V vocabulary, D model width.


class PlainBackend:
    """The plain model with a paged cache; on any device and for every family."""

    keys_across = False

    def __init__(self, model: Decoder) -> None:
        self.model = model
        weight = next(model.parameters())
        if weight.dtype != torch.float64:
            widen_logits(model)  # as the trainer's are
        self.parameters = dict(model.named_parameters())
        self.config = model.config
        self.page_size = self._page_size()
        self.device = weight.device
        self.cache = PagedCache(
            self.config.num_layers,
            self._kv_heads(),
            self.config.head_width,
            self.page_size,
            dtype=weight.dtype,
            device=weight.device,
            keys_across=self.keys_across,
        )

    def _page_size(self) -> int:
        return PAGE

    def _kv_heads(self) -> int:
        return self.config.kv_heads

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this rank serves of a parameter."""
        return whole

    def agreed(self, flags: Sequence[bool]) -> list[bool]:
        """What each rank found on its own, as all that share the generator take it."""
        return list(flags)

    def refresh(self) -> None:
        """The model's weights have changed."""

    def served(self) -> dict[str, Tensor]:
        """The weights that decoding really uses, under our names."""
        return dict(self.parameters)

    def resize(self, num_pages: int) -> None:
        """See `PagedCache.resize`."""
        self.cache.resize(num_pages)

    def forward(self, rows: Sequence[Cached]) -> Tensor:
        """Compute what rows have pending, into their pages; logits (BV) after their last tokens.

        Rows with one token go together, then those with more, padded on the right.
        """
        single = [i for i, row in enumerate(rows) if len(row.pending) == 1]
        longer = [i for i, row in enumerate(rows) if len(row.pending) > 1]
        order, logits = [], []
        for some in (single, *_bounded(longer, [len(row.pending) for row in rows])):
            if some:
                order += some
                logits.append(self._forward([rows[i] for i in some]))
        whole_BV = logits[0] if len(logits) == 1 else torch.cat(logits)
        if order == sorted(order):
            return whole_BV
        return whole_BV[torch.tensor(order, device=self.device).argsort()]

    def _forward(self, rows: Sequence[Cached]) -> Tensor:
        pending = [row.pending for row in rows]
        width = max(map(len, pending))
        ids_BT = self._long([[*ids, *[0] * (width - len(ids))] for ids in pending])
        starts_B, lengths_B = (
            self._long([r.length for r in rows]),
            self._long(list(map(len, pending))),
        )
        self.cache.plan(starts_B, lengths_B, self.tables(rows), not any(r.length for r in rows))
        index_T = torch.arange(width, device=self.device)  # padding stands where its row ends
        positions_BT = starts_B[:, None] + torch.minimum(index_T, lengths_B[:, None] - 1)
        last_B = torch.arange(len(rows), device=self.device), lengths_B - 1
        if type(self.model).forward is not Decoder.forward:  # then logits are its own to compute
            return self.model(ids_BT, positions_BT, cache=self.cache)[last_B]
        hidden_BTD = self.model.hidden(ids_BT, positions_BT, cache=self.cache)
        return self.model.logits(hidden_BTD[last_B])

    def tables(self, rows: Sequence[Cached]) -> Tensor:
        """The rows' pages (int64 BP), each row filled up with its last one."""
        width = max(len(row.table) for row in rows)
        return self._long([[*r.table, *r.table[-1:] * (width - len(r.table))] for r in rows])

    def _long(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def choose(self, logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor) -> Choice:
        """See `sampling.choose`."""
        return sampling_.choose(logits_NV, sampling, uniform_N)


def _bounded(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows in order, as many together as stay within `MAX_PREFILL_TOKENS` when padded."""
    some: list[int] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if some and longest * (len(some) + 1) > MAX_PREFILL_TOKENS:
            yield some
            some, longest = [], lengths[row]
        some.append(row)
    yield some
