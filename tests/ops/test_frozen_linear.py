"""A linear layer over a weight that is made for each product: results, gradients, what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops import nf4
from shardwise.ops.frozen_linear import frozen_linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_linear_over_what_is_made(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    quantised = nf4.quantise(torch.randn(24, 40, generator=generator))
    runs = nf4.Runs.of((24, 40), range(24), range(40))
    made: list[torch.dtype] = []

    def dense(dtype: torch.dtype) -> Tensor:
        made.append(dtype)
        return quantised.dequantise(runs, dtype).view(24, 40)

    x = torch.randn(3, 5, 40, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(3, 5, 24, generator=generator).to(dtype)
    expected = F.linear(x, dense(dtype))
    [expected_grad] = torch.autograd.grad(expected, x, grad)
    made.clear()
    found = frozen_linear(x, dense)
    assert made == [dtype]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        frozen_linear(x, dense)
    assert not kept  # neither the weight nor the input
    found.backward(grad)
    assert torch.equal(found, expected) and x.grad is not None
    torch.testing.assert_close(x.grad, expected_grad)
    assert len(made) == 3  # the product, the one whose keeping was looked at, and backward
