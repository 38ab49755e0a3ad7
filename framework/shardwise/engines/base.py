"""The engine contract (design decision 8). Stages talk to nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.contract import Loss


@dataclasses.dataclass
class State:
    """All that a resume needs: tensors (possibly DTensors, by name) and plain JSON.

    ``nonfinite`` names those tensors that may hold NaN and infinities.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    nonfinite: frozenset[str] = frozenset()


class Engine(Protocol):
    """A model, its optimizer and its layout."""

    data_rank: int  # which slice of a global batch this rank computes; -1: none
    data_size: int  # into how many slices a global batch is cut

    def forward_backward(self, microbatches: Sequence[MicroBatch], loss: Loss) -> dict[str, float]:
        """Accumulate gradients of the global batch; returns reduced metrics, with `loss`.

        One call for all micro-batches of an update, then `step`; a second call before it may
        raise RuntimeError.
        """
        ...

    def step(self, lr: float) -> float:
        """Clip and update; returns the global gradient norm before clipping.

        NaN or infinity in the norm means that every rank skipped the update.
        """
        ...

    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """Without gradient: ``fn(logits, batch)`` for each micro-batch of this rank."""
        ...

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over the data ranks, in fp64; every rank of the world gets the sums."""
        ...

    def broadcast(self, value: Any) -> Any:
        """A value (plain JSON) that the engine's ranks agree on, on every rank of the world."""
        ...

    def events(self) -> list[tuple[str, str]]:
        """What happened inside since the last call that a log should tell, as (kind, text)."""
        ...

    def state_dict(self) -> State:
        """Weights (``model.*``) and optimizer state (``optim.*``), fp32 masters."""
        ...

    def load_state_dict(self, state: Mapping[str, Any] | State) -> None:
        """Take over the JSON part of a state whose tensors were loaded in place."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under Hugging Face names, one at a time; a collective call."""
        ...
