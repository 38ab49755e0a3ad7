"""Weight products that are left for later, in order."""

from __future__ import annotations

import torch
from torch import Tensor

from shardwise.ops.linear import Accumulate, deferred, linear


def _leaves() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4), (5, 4), (5,))
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)
    return x, w, b


def test_gradients_equal_a_plain_layers_now_or_later() -> None:
    x, w, b = _leaves()
    expected = torch.autograd.grad(torch.nn.functional.linear(x, w, b).square().sum(), (x, w, b))
    for later in (False, True):
        x, w, b = _leaves()
        collected: list[Tensor] = []
        y = linear(x, w, b, Accumulate(collected.append))
        if not later:
            y.square().sum().backward()
            assert w.grad is not None and not collected
            got = w.grad
        else:
            with deferred() as products:
                y.square().sum().backward()
            assert w.grad is None and not collected and len(products) == 1
            products[0]()
            [got] = collected
            assert not got.requires_grad  # what it was made from can be freed
        for value, want in zip((x.grad, got, b.grad), expected, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-13, atol=1e-13)


def test_the_list_keeps_the_order_of_the_backward_pass() -> None:
    x, w, _ = _leaves()
    seen: list[str] = []
    y = linear(x, w, None, Accumulate(lambda g: seen.append("first")))
    ones = torch.ones(2, 5, dtype=torch.float64).requires_grad_()
    z = linear(y, ones, None, Accumulate(lambda g: seen.append("second")))
    with deferred() as products:
        z.sum().backward()
    assert seen == []
    for product in products:
        product()
    assert seen == ["second", "first"]


def test_products_wait_in_the_list_of_their_own_unless_a_schedule_asks() -> None:
    x, w, _ = _leaves()
    mine: list[object] = []
    linear(x, w, None, Accumulate(lambda g: None, mine)).sum().backward()  # type: ignore[arg-type]
    assert len(mine) == 1 and w.grad is None and x.grad is not None
    with deferred() as products:
        linear(x, w, None, Accumulate(lambda g: None, mine)).sum().backward()  # type: ignore[arg-type]
    assert len(mine) == 1 and len(products) == 1
