"""Linear layers whose weight gradient may be computed later, and in order.

Pipeline schedules that split the backward pass first want the gradients of activations, which
another rank waits for, and the gradients of weights when there is nothing better to do (Qi et al.
2023, "Zero Bubble Pipeline Parallelism"). `deferred` collects the second half as a list.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: N rows, I input features, O output features.

_LATER: list[list[Callable[[], None]]] = []


@contextlib.contextmanager
def deferred() -> Iterator[list[Callable[[], None]]]:
    """Backward passes inside leave out the weight products; calling the list's items makes them."""
    later: list[Callable[[], None]] = []
    _LATER.append(later)
    try:
        yield later
    finally:
        _LATER.pop()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, accumulate: Callable[[Tensor], None], later: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.accumulate, ctx.later = accumulate, later
        return F.linear(x, weight_OI)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        x, weight_OI = ctx.saved_tensors
        grad_x = grad @ weight_OI if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None

        def product() -> Tensor:
            result: Tensor = grad.flatten(0, -2).T @ x.flatten(0, -2)
            return result

        later = _LATER[-1] if _LATER else ctx.later
        if later is None:
            return grad_x, product(), None, None
        accumulate = ctx.accumulate
        later.append(lambda: accumulate(product()))
        return grad_x, None, None, None


def linear(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    accumulate: Callable[[Tensor], None] | None,
    later: list[Callable[[], None]] | None = None,
) -> Tensor:
    """``x @ weight.T + bias``. With ``accumulate``, the weight's gradient can be deferred.

    ``accumulate(grad_OI)`` adds to the weight's gradient. ``later`` takes the weight products of
    backward passes outside of `deferred`; whoever gave it calls its items. A bias's gradient is
    never deferred: it is a sum, not a product.
    """
    if accumulate is None:
        return F.linear(x, weight_OI, bias_O)
    out: Tensor = _Linear.apply(x, weight_OI, accumulate, later)
    return out if bias_O is None else out + bias_O
