"""Keys and values of past tokens, for generation.

The index of a token in its row of the cache is its position id, so rows may have different
lengths, and a padded prefill leaves entries that no query can see before they are overwritten.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from shardwise.ops.attention import Mask, allowed_by_position

# Shape suffixes: B sequences, T new tokens, S cached tokens, G key/value heads, K head width.


class KVCache(Protocol):
    """What a model asks of a cache. One forward pass is ``begin`` and one ``update`` a layer."""

    def begin(self, position_ids_BT: Tensor) -> None:
        """Announce where the new tokens stand (int64 position of each in its own row)."""
        ...

    def mask(self, window: int | None) -> Mask:
        """What the new tokens may see, over the S entries that ``update`` will return."""
        ...

    def update(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer; return all S of them (BGSK)."""
        ...


class SimpleCache:
    """A cache of ``max_seq_len`` entries a row, allocated at once. Plain, for tests and small work.

    Keys and values take ``2 * num_layers * B * G * max_seq_len * K`` elements.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, batch_size, num_kv_heads, max_seq_len, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.width = 0  # entries in use by the longest row
        self.position_ids_BT = torch.empty(0, dtype=torch.int64, device=device)

    def begin(self, position_ids_BT: Tensor) -> None:
        """See `KVCache`; raises ValueError when a position is beyond the cache."""
        last = int(position_ids_BT.max())
        if last >= self.k.shape[3]:
            raise ValueError(
                f"position {last} does not fit a cache of {self.k.shape[3]} entries a row; "
                "make it with a larger max_seq_len"
            )
        self.width = max(self.width, last + 1)
        self.position_ids_BT = position_ids_BT

    def mask(self, window: int | None) -> Mask:
        """See `KVCache`."""
        key_S = torch.arange(self.width, device=self.position_ids_BT.device)
        return Mask(allowed_B1TS=allowed_by_position(self.position_ids_BT, key_S, window))

    def update(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache`."""
        index = self.position_ids_BT[:, None, :, None].expand_as(k_BGTK)
        self.k[layer].scatter_(2, index, k_BGTK)
        self.v[layer].scatter_(2, index, v_BGTK)
        return self.k[layer, :, :, : self.width], self.v[layer, :, :, : self.width]
