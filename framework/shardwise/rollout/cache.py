"""Keys and values of the sequences in flight, in pages; see `pages.py` for who holds which.

Rotary positions are inside the keys, hence a page can be copied to another as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardwise.ops.attention import Mask, allowed_by_position

# Shape suffixes: B rows, T new tokens, S cached tokens, P pages a row, N new tokens of all rows,
# G key/value heads, K head width.


class PagedCache:
    """A `models.common.cache.KVCache` over pages.

    ``k`` and ``v`` are (layers, G, pages, page size, K); with ``keys_across``, each page of keys is
    (K, page size), which only `native.py` reads and writes.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        keys_across: bool = False,
    ) -> None:
        self.page_size = page_size
        sizes = (head_dim, page_size) if keys_across else (page_size, head_dim)
        options = {"dtype": dtype, "device": device}
        self.k = torch.zeros(num_layers, num_kv_heads, 0, *sizes, **options)  # type: ignore[call-overload]
        self.v = torch.zeros(num_layers, num_kv_heads, 0, page_size, head_dim, **options)  # type: ignore[call-overload]

    @property
    def num_pages(self) -> int:
        """Pages that there is room for."""
        return int(self.v.shape[2])

    def resize(self, num_pages: int) -> None:
        """Have room for so many pages; those that there are stay as far as they fit."""
        for name in ("k", "v"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], num_pages, *old.shape[3:])
            both = min(num_pages, old.shape[2])
            new[:, :, :both] = old[:, :, :both]
            setattr(self, name, new)

    def copy(self, source: int, target: int) -> None:
        """Copy a page over another."""
        for pages in (self.k, self.v):
            pages[:, :, target] = pages[:, :, source]

    def clear(self, page: int) -> None:
        """Zero the values of a page: what is not seen counts 0 times, and that is NaN of NaN."""
        self.v[:, :, page].zero_()

    def plan(self, starts_B: Tensor, lengths_B: Tensor, tables_BP: Tensor, fresh: bool) -> None:
        """The next forward pass extends rows that have ``starts_B`` tokens by ``lengths_B``.

        Its ids may be padded on the right. ``fresh``: no row has any token yet.
        """
        width = int(lengths_B.max())
        index_T = torch.arange(width, device=starts_B.device)
        self.real_BT = index_T < lengths_B[:, None]
        row_N, index_N = self.real_BT.nonzero(as_tuple=True)
        at_N = starts_B[row_N] + index_N
        self.page_N = tables_BP[row_N, at_N // self.page_size]
        self.offset_N = at_N % self.page_size
        self.tables_BP, self.fresh = tables_BP, fresh

    def begin(self, position_ids_BT: Tensor) -> None:
        """See `KVCache`."""
        self.position_ids_BT = position_ids_BT

    def mask(self, window: int | None) -> Mask:
        """See `KVCache`. Padding stands right of what it could disturb, and is not stored."""
        positions_BT = self.position_ids_BT
        width = positions_BT.shape[1] if self.fresh else self.tables_BP.shape[1] * self.page_size
        if self.fresh and (window is None or window >= width):
            return Mask()
        key_S = torch.arange(width, device=positions_BT.device)
        return Mask(allowed_B1TS=allowed_by_position(positions_BT, key_S, window))

    def update(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache`."""
        keys, values = self.k[layer], self.v[layer]
        keys[:, self.page_N, self.offset_N] = k_BGTK.transpose(1, 2)[self.real_BT].transpose(0, 1)
        values[:, self.page_N, self.offset_N] = v_BGTK.transpose(1, 2)[self.real_BT].transpose(0, 1)
        if self.fresh:
            return k_BGTK, v_BGTK
        return self._rows(keys), self._rows(values)

    def _rows(self, pages: Tensor) -> Tensor:
        """The pages of each row, one behind the other (BGSK)."""
        rows_GPSK = pages.index_select(1, self.tables_BP.flatten())
        sizes = (*pages.shape[:1], len(self.tables_BP), -1, pages.shape[-1])
        return rows_GPSK.view(sizes).transpose(0, 1)
