"""A linear layer whose three products run on quantised operands, forward and backward.

``y = q(x) q(w)^T``, ``dx = q(g) q(w)``, ``dw = q(g)^T q(x)``: every operand is quantised along the
dimension that its product sums over, from high precision each time (never twice).

What is seen of the operands is noted in the backward pass: it runs once, where recompute runs the
forward pass twice and an evaluation runs no backward pass at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.ops import fp8
from shardwise.ops.fp8 import OPERANDS, Operand, Quantised, Recipe
from shardwise.ops.linear import Accumulate, linear

# Shape suffixes: N rows (all tokens), I input features, O output features.


@dataclasses.dataclass
class Site:
    """One quantised linear layer: its scales, what it has seen this step, whether it is watched.

    ``scale_3`` and ``amax_3`` (operands x, w, g) are views of the model's memory (delayed scaling;
    elsewhere ``scale_3`` stays 1). ``tally`` collects the sentinel's sums while ``watched``.
    """

    path: str
    recipe: Recipe
    scale_3: Tensor
    amax_3: Tensor
    active: bool = True  # else computed without quantisation
    # Delayed scaling, by operand: whether its scale comes from a history. Until then, a tensor is
    # scaled by its own amax: a scale of 1 would lose what the first gradients say.
    calibrated: Sequence[bool] = (False, False, False)
    watched: bool = False
    tally: Tensor | None = None
    part: int = 0  # which rank's share of the product this is

    def scale(self, operand: Operand, amax: Tensor) -> Tensor | None:
        """The one scale of a tensor; None where it has many."""
        i = OPERANDS.index(operand)
        if self.recipe.block(operand) is not None:
            return None
        if self.recipe.scaling == "delayed" and self.calibrated[i]:
            return self.scale_3[i]
        return fp8.scale_from_amax(amax, self.recipe.dtype(operand))

    def along_rows(self, q: Quantised, x_RK: Tensor, operand: Operand) -> Quantised:
        """The operand of a product over its rows, KR."""
        turned = q.transposed()
        return fp8.quantise(x_RK.T, operand, self.recipe, None) if turned is None else turned

    def linear(self, x: Tensor, weight_OI: Tensor, accumulate: Accumulate | None) -> Tensor:
        """``x @ weight.T``; see `ops.linear.linear` for ``accumulate``."""
        if not self.active:
            return linear(x, weight_OI, None, accumulate)
        training = torch.is_grad_enabled()
        return _Linear.apply(x, weight_OI, self, training, accumulate)  # type: ignore[no-any-return]


# --- who looks on ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seen:
    """The operands of one backward pass of one layer."""

    site: Site
    amax_3: Tensor
    scale_inv: dict[str, Tensor]  # by operand; ``xt`` and so on where it is quantised a second time


_LISTENERS: list[Callable[[Seen], None]] = []


@contextlib.contextmanager
def listening(listener: Callable[[Seen], None]) -> Iterator[None]:
    """Tell ``listener`` of every quantised layer's backward pass inside."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


# The sentinel's sums of a layer. For each product: squared error against the shadow, and squared
# shadow. For each operand: elements that are not zero, those that became zero, those cut off.
PRODUCTS = ("y", "dx", "dw")
NOISE = 2.0**-40
NUM_SUMS = 2 * len(PRODUCTS) + 3 * len(OPERANDS)


def _note_product(site: Site, name: str, found: Tensor, shadow: Tensor) -> None:
    assert site.tally is not None
    i = 2 * PRODUCTS.index(name)
    site.tally[i] += (found.double() - shadow.double()).square().sum()
    site.tally[i + 1] += shadow.double().square().sum()


def _note_operand(site: Site, operand: Operand, x_RK: Tensor, q: Quantised) -> None:
    assert site.tally is not None
    i = 2 * len(PRODUCTS) + 3 * OPERANDS.index(operand)
    # What is that far below the amax is a zero that another order of summing did not hit.
    there = x_RK.abs() > fp8.amax(x_RK) * NOISE
    zero = (q.data_RK.contiguous().view(torch.uint8) & 0x7F) == 0
    limit = fp8.MAX[q.data_RK.dtype] * q.spread()
    site.tally[i] += there.sum()
    site.tally[i + 1] += (there & zero).sum()
    site.tally[i + 2] += (x_RK.float().abs() > limit).sum()


# --- the products -------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        site: Site,
        training: bool,
        accumulate: Accumulate | None,
    ) -> Tensor:
        x_NI = x.flatten(0, -2)
        amax_x, amax_w = fp8.amax(x_NI), fp8.amax(weight_OI)
        qx = fp8.quantise(x_NI, "x", site.recipe, site.scale("x", amax_x))
        qw = fp8.quantise(weight_OI, "w", site.recipe, site.scale("w", amax_w))
        y_NO = fp8.product(qx, qw, x.dtype)
        if not training:
            return y_NO.view(*x.shape[:-1], -1)
        turned = site.along_rows(qx, x_NI, "x")
        watched = site.watched
        # The weight itself is kept, not its quantised copy: ZeRO-3 frees and gathers it.
        ctx.save_for_backward(
            weight_OI, amax_x, amax_w, turned.data_RK, turned.scale_inv, x_NI if watched else None
        )
        ctx.block, ctx.qx_scale_inv = turned.block, qx.scale_inv
        ctx.site, ctx.accumulate, ctx.shape = site, accumulate, x.shape
        if watched:
            _note_product(site, "y", y_NO, x_NI @ weight_OI.T)
            _note_operand(site, "x", x_NI, qx)
            _note_operand(site, "w", weight_OI, qw)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        weight_OI, amax_x, amax_w, data, scale_inv, x_NI = ctx.saved_tensors
        site: Site = ctx.site
        g_NO = grad.flatten(0, -2)
        amax_3 = torch.stack([amax_x, amax_w, fp8.amax(g_NO)])
        qg = fp8.quantise(g_NO, "g", site.recipe, site.scale("g", amax_3[2]))
        qw = fp8.quantise(weight_OI, "w", site.recipe, site.scale("w", amax_w))
        site.amax_3.copy_(torch.maximum(site.amax_3, amax_3))
        turned_w, turned_g = site.along_rows(qw, weight_OI, "w"), site.along_rows(qg, g_NO, "g")
        for listener in _LISTENERS:
            found = {"x": ctx.qx_scale_inv, "w": qw.scale_inv, "g": qg.scale_inv}
            if site.recipe.block("x") is not None:
                found |= {"xt": scale_inv, "wt": turned_w.scale_inv, "gt": turned_g.scale_inv}
            listener(Seen(site, amax_3, found))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = fp8.product(qg, turned_w, grad.dtype).view(ctx.shape)
        if x_NI is not None:
            _note_operand(site, "g", g_NO, qg)
            if grad_x is not None:
                _note_product(site, "dx", grad_x.flatten(0, -2), g_NO @ weight_OI)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None, None
        turned_x = Quantised(data, scale_inv, ctx.block)

        def weight_product() -> Tensor:
            dw_OI = fp8.product(turned_g, turned_x, grad.dtype)
            if x_NI is not None:
                _note_product(site, "dw", dw_OI, g_NO.T @ x_NI)
            return dw_OI

        if ctx.accumulate is None or not ctx.accumulate.leave(weight_product):
            return grad_x, weight_product(), None, None, None
        return grad_x, None, None, None, None
