"""A linear layer whose weight stands still and is kept in another form than it computes in.

The weight is made anew for each product, forward and backward, and let go behind it: nothing keeps
it in full, neither between layers nor for the backward pass. Nothing else is kept either: without a
gradient for the weight, the input is not needed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: I input features, O output features. Inputs have any dimensions in front of them.

Dense = Callable[[torch.dtype], Tensor]  # the weight (OI) in this dtype, made anew


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Dense) -> Tensor:
        ctx.dense, ctx.dtype = dense, x.dtype
        return F.linear(x, dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad.to(ctx.dtype) @ ctx.dense(ctx.dtype), None


@torch.compiler.disable  # what makes the weight may be another library's
def frozen_linear(x: Tensor, dense: Dense) -> Tensor:
    """``x @ weight.T``; the gradient of ``x`` alone."""
    return _FrozenLinear.apply(x, dense)  # type: ignore[no-any-return]
