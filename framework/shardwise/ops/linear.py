"""Linear layers whose weight gradient may be computed later, and in order.

Pipeline schedules that split the backward pass first want the gradients of activations, which
another rank waits for, and the gradients of weights when there is nothing better to do (Qi et al.
2023, "Zero Bubble Pipeline Parallelism"). `deferred` collects the second half as a list.
"""

from __future__ import annotations

import contextlib
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Accumulate:
    """Adds to a weight's gradient outside of autograd, so that its product can wait.

    ``later`` takes the products of backward passes outside of `deferred`; whoever gave it calls
    its items. None: autograd computes them at once.
    """

    add: Callable[[Tensor], None]
    later: list[Callable[[], None]] | None = None

    def leave(self, product: Callable[[], Tensor]) -> bool:
        """Leave a weight product for later; False: nobody would compute it."""
        waiting = _LATER[-1] if _LATER else self.later
        if waiting is not None:
            waiting.append(lambda: self._add(product))
        return waiting is not None

    @torch.no_grad()  # whoever calls it need not be inside a backward pass
    def _add(self, product: Callable[[], Tensor]) -> None:
        self.add(product())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, accumulate: Accumulate | None, wide: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.accumulate = accumulate
        return _fp32_product(x, weight_OI) if wide else F.linear(x, weight_OI)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        x, weight_OI = ctx.saved_tensors
        grad = grad.to(x.dtype)
        grad_x = grad @ weight_OI if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None

        def product() -> Tensor:
            result: Tensor = grad.flatten(0, -2).T @ x.flatten(0, -2)
            return result

        if ctx.accumulate is None or not ctx.accumulate.leave(product):
            return grad_x, product(), None, None
        return grad_x, None, None, None


def _fp32_product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32, of 16-bit operands as they are."""
    if x.is_cuda:
        out_NO: Tensor = torch.mm(x.flatten(0, -2), weight_OI.T, out_dtype=torch.float32)
        return out_NO.view(*x.shape[:-1], len(weight_OI))
    return F.linear(x.float(), weight_OI.float())


def linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, accumulate: Accumulate | None
) -> Tensor:
    """``x @ weight.T + bias``. With ``accumulate``, the weight's gradient can be deferred.

    A bias's gradient is never deferred: it is a sum, not a product.
    """
    if accumulate is None:
        return F.linear(x, weight_OI, bias_O)
    out: Tensor = _Linear.apply(x, weight_OI, accumulate, False)
    return out if bias_O is None else out + bias_O


def wide_linear(x: Tensor, weight_OI: Tensor, accumulate: Accumulate | None = None) -> Tensor:
    """`linear` of 16-bit operands with an fp32 result.

    The gradient is rounded to the operands' dtype, in which the backward products are.
    """
    return _Linear.apply(x, weight_OI, accumulate, True)  # type: ignore[no-any-return]
