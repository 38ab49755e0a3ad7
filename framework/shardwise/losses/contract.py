"""The loss contract (design decision 2): named terms, each a sum with its count and its weight.

Counts depend on the batch alone, so the engine reduces them over all micro-batches and data ranks
*before* the backward pass and divides each term's sum once, by its global count. Gradients are
sums over data ranks, never means. Accumulation, micro-batch size, padding, packing and data
parallelism therefore cannot change a gradient beyond rounding.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

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
    """A loss over logits. ``weights`` scale the terms in the total: sum_i w_i * sum_i / count_i.

    Where its ``__call__`` is marked by `reads_valid`, an engine may leave all other logits out.
    """

    weights: Mapping[str, float]

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """Term name to its count (float64 scalar) in this micro-batch; needs no model.

        A term whose global count is zero is not divided: zero everywhere makes it a plain sum.
        """
        ...

    def __call__(self, logits_BTV: Any, batch: MicroBatch) -> LossOutput:
        """Sums of every term over this micro-batch."""
        ...


Reader = TypeVar("Reader", bound=Callable[..., Any])


def reads_valid(function: Reader) -> Reader:
    """Say of a function of (logits, batch) that it reads logits under the loss mask alone.

    Engines then need not compute the others: prompts cost neither the head's products nor memory
    for logits. What it gets may be an `ops.logits.Logits`; `losses.logprobs.valid_logprobs` reads
    both. A class that overrides a marked ``__call__`` says it anew.
    """
    function.reads = "valid"  # type: ignore[attr-defined]
    return function


def is_marked(reader: Callable[..., Any]) -> bool:
    """Whether a loss, or another function of (logits, batch), has the mark of `reads_valid`."""
    called = reader if inspect.isroutine(reader) else type(reader).__call__
    return getattr(called, "reads", "all") == "valid"
