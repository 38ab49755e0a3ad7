"""Keys and values of the sequences in flight, one slot each, filled from the left.

The rows that decode are always the slots 0 to n - 1, so a step reads a slice, never a gather.
Rotary positions are inside the keys, hence a slot can be copied to another as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardwise.ops.attention import Mask, allowed_by_position

# Shape suffixes: B prompts or rows, T new tokens, S cached tokens, G key/value heads, K head width.


class SlotCache:
    """A `models.common.cache.KVCache` over slots; allocated once for a call of `generate`.

    ``k`` and ``v`` are (layers, slots, G, capacity, K); with a ``key_tile`` of t, keys are
    (layers, slots, G, capacity / t, K, t), which only `native.py` reads and writes.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        key_tile: int = 1,
    ) -> None:
        shape: tuple[int, ...] = (num_layers, num_slots, num_kv_heads, capacity, head_dim)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.key_tile = key_tile
        if key_tile > 1:
            shape = (*shape[:3], capacity // key_tile, head_dim, key_tile)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.width = 0
        self.slots: Tensor | None = None  # where the rows of a prefill go
        self.source: Tensor | None = None  # which prompt each of those slots copies
        self.position_ids_BT = torch.empty(0, dtype=torch.int64, device=device)

    def prefill_into(self, slots: Tensor, source: Tensor) -> None:
        """The next forward pass is a prefill; slot ``slots[i]`` gets prompt row ``source[i]``."""
        self.slots, self.source = slots, source

    def decode(self) -> None:
        """The next forward passes append one token to each of the first slots."""
        self.slots = self.source = None

    def begin(self, position_ids_BT: Tensor) -> None:
        """See `KVCache`."""
        self.position_ids_BT = position_ids_BT
        self.width = int(position_ids_BT.max()) + 1
        assert self.width <= self.capacity, "the scheduler ends rows before their slot is full"

    def mask(self, window: int | None) -> Mask:
        """See `KVCache`. A prefill is causal: padding stands right of what it could disturb."""
        if self.slots is not None and (window is None or window >= self.width):
            return Mask()
        key_S = torch.arange(self.width, device=self.position_ids_BT.device)
        return Mask(allowed_B1TS=allowed_by_position(self.position_ids_BT, key_S, window))

    def update(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache`."""
        keys, values = self.k[layer], self.v[layer]
        if self.slots is not None:
            keys[self.slots, :, : self.width] = k_BGTK[self.source]
            values[self.slots, :, : self.width] = v_BGTK[self.source]
            return k_BGTK, v_BGTK
        num_rows = k_BGTK.shape[0]
        rows_B = torch.arange(num_rows, device=k_BGTK.device)
        keys[rows_B, :, self.position_ids_BT[:, 0]] = k_BGTK[:, :, 0]
        values[rows_B, :, self.position_ids_BT[:, 0]] = v_BGTK[:, :, 0]
        return keys[:num_rows, :, : self.width], values[:num_rows, :, : self.width]

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first ``width`` tokens of slots over others (int64 indices)."""
        for tensor, size in ((self.k, -(-width // self.key_tile)), (self.v, width)):
            tensor[:, target, :, :size] = tensor[:, source, :, :size]
