"""The loss contract (design decision 2): named terms, each a sum with its count and its weight.

Counts depend on the batch alone, so the engine reduces them over all micro-batches and data ranks
*before* the backward pass and divides each term's sum once, by its global count. Gradients are
sums over data ranks, never means. Accumulation, micro-batch size, padding, packing and data
parallelism therefore cannot change a gradient beyond rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from shardwise.data.batch import MicroBatch


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """What a loss returns for one micro-batch.

    ``sums``: term name to its differentiable fp32 scalar sum.
    ``metrics``: name to a detached (sum, count) pair, reduced over everything and then divided.
    """

    sums: Mapping[str, Tensor]
    metrics: Mapping[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)


class Loss(Protocol):
    """A loss over logits. ``weights`` scale the terms in the total: sum_i w_i * sum_i / count_i."""

    weights: Mapping[str, float]

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """Term name to its count (float64 scalar) in this micro-batch; needs no model.

        A term whose global count is zero is not divided: zero everywhere makes it a plain sum.
        """
        ...

    def __call__(self, logits_BTV: Any, batch: MicroBatch) -> LossOutput:
        """Sums of every term over this micro-batch."""
        ...
