"""A rank's part of a tensor as regions of it, each in memory of its own.

So does a library hold our tensors that fuses several into one parameter, cuts that over tensor
ranks, and deals out stretches of it (Megatron's distributed optimizer). As with `ops.flat_shard`,
it is the global tensor to whoever asks for its shape, and `local_shards` tells what is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.ops.regions import Region


class RegionShards(Tensor):
    """Regions of a tensor of ``shape``, each with the live memory that holds it.

    ``like``: a tensor of its dtype and on its device. ``cut``: along which dimension tensor ranks
    cut it; None: each has all of it. Of operations it knows `detach`, `clone` and `copy_`.
    """

    parts: tuple[tuple[Region, Tensor], ...]
    cut: int | None

    @staticmethod
    def __new__(
        cls,
        parts: Sequence[tuple[Region, Tensor]],
        shape: Sequence[int],
        like: Tensor,
        cut: int | None = None,
    ) -> RegionShards:
        """See the class."""
        self: RegionShards = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tuple(shape), dtype=like.dtype, device=like.device
        )
        self.parts, self.cut = tuple(parts), cut
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Which part of what."""
        return f"RegionShards({[r for r, _ in self.parts]} of {list(self.shape)}, {self.dtype})"

    def to_local(self) -> Tensor:
        """All that is here: its memory, where that is one region, else a copy [n]."""
        if len(self.parts) == 1:
            return self.parts[0][1]
        views = [view.reshape(-1) for _, view in self.parts]
        return torch.cat(views) if views else torch.empty(0, dtype=self.dtype, device=self.device)

    def _with(self, views: Sequence[Tensor]) -> RegionShards:
        parts = [(region, view) for (region, _), view in zip(self.parts, views, strict=True)]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return RegionShards(parts, self.shape, like, self.cut)

    def detach(self) -> RegionShards:
        """The same memory; below the dispatcher its counter of writes would be another."""
        return self._with([view.detach() for _, view in self.parts])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """`detach`, `clone` and `copy_`."""
        shards = args[0]
        if func is torch.ops.aten.copy_.default and isinstance(args[1], cls):
            for (_, own), (_, other) in zip(shards.parts, args[1].parts, strict=True):
                own.copy_(other)
            return shards
        if func not in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            raise NotImplementedError(f"{func} of RegionShards: gather it, or use `to_local`")
        return shards._with([func(view) for _, view in shards.parts])
