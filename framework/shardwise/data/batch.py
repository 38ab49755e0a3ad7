"""The one shape in which tokens reach an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Shape suffixes: B sequences of a micro-batch, T tokens, V vocabulary, D model width.


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Sequences that one rank computes at once.

    ``targets_BT[b, t]`` is the token that position ``t`` should predict (already shifted), and
    ``loss_mask_BT`` says which targets are *valid*, that is, carry loss. ``segment_ids_BT`` is
    None when every row is one document; otherwise attention stays within equal segment ids.
    """

    input_ids_BT: Tensor  # int64
    position_ids_BT: Tensor  # int64, restarts at 0 with each packed document
    targets_BT: Tensor  # int64
    loss_mask_BT: Tensor  # bool
    sample_ids_B: Tensor  # int64, global index of each row; the root of its dropout rng keys
    segment_ids_BT: Tensor | None = None  # int64
    extras: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # by stage, first dim B
    # Of this mask alone: a copy with another does not inherit it.
    _valid_N: Tensor | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def num_tokens(self) -> int:
        """All positions, padding included."""
        return self.input_ids_BT.numel()

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return self.input_ids_BT.shape[0]

    def valid(self) -> Tensor:
        """Where the flattened loss mask is True (int64). After `to`, the device need not count."""
        return indices(self.loss_mask_BT) if self._valid_N is None else self._valid_N

    def map(self, fn: Callable[[Tensor], Tensor]) -> MicroBatch:
        """A copy with ``fn`` applied to every tensor."""
        fields: dict[str, Any] = {}
        for f in _given():
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                fields[f.name] = fn(value)
            elif isinstance(value, dict):
                fields[f.name] = {k: fn(v) for k, v in value.items()}
            else:
                fields[f.name] = value
        return MicroBatch(**fields)

    def to(self, device: torch.device | str) -> MicroBatch:
        """A copy on ``device``; its valid tokens are counted here, where nobody waits for it."""
        moved = self.map(lambda t: t.to(device, non_blocking=True))
        object.__setattr__(moved, "_valid_N", self.valid().to(device, non_blocking=True))
        return moved

    def split(self, rows: int) -> list[MicroBatch]:
        """Cut into micro-batches of at most ``rows`` sequences, in order."""
        size = self.input_ids_BT.shape[0]
        return [self.map(lambda t, i=i: t[i : i + rows]) for i in range(0, size, rows)]  # type: ignore[misc]


def indices(mask: Tensor) -> Tensor:
    """Where a flattened bool mask is True (int64)."""
    return mask.flatten().nonzero().flatten()


def _given() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(MicroBatch) if f.init]


def join(parts: Sequence[MicroBatch]) -> MicroBatch:
    """The rows of several micro-batches of equal length, with the same optional fields, in one."""
    fields: dict[str, Any] = {}
    for f in _given():
        values = [getattr(p, f.name) for p in parts]
        if isinstance(values[0], Tensor):
            fields[f.name] = torch.cat(values)
        elif isinstance(values[0], dict):
            fields[f.name] = {k: torch.cat([v[k] for v in values]) for k in values[0]}
        else:
            fields[f.name] = values[0]
    return MicroBatch(**fields)
