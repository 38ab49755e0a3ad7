"""8-bit floats as the papers have them: casts by arithmetic, scales, products. The oracle's own.

- E4M3 and E5M2, saturating casts, one scale a tensor: Micikevicius et al. 2022, "FP8 formats for
  deep learning", sections 3 and 4.
- Scales of earlier updates (*delayed*) or of the tensor itself (*current*): Transformer Engine's
  user guide, "Using FP8 with Transformer Engine": ``scale = max / amax / 2^margin``.
- 1 x 128 tiles of activations and gradients, 128 x 128 tiles of weights, powers of two:
  DeepSeek-V3 2024, section 3.3.2.
- 1 x 32 tiles with E8M0 scales: OCP Microscaling formats 1.0, section 5.2; exponents are rounded up
  as in Mishra et al. 2025, "Recipes for pre-training LLMs with MXFP8".

The native engine never imports this, nor this the quantisers that it uses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.config.schema import Fp8Config

# Shape suffixes: R rows, K what a product sums over, r and k tiles along them, N tokens of a
# micro-batch, I input and O output features, H updates of history, 3 operands (x, w, g).

Operand = Literal["x", "w", "g"]  # input, weight, gradient of the output
OPERANDS: tuple[Operand, ...] = ("x", "w", "g")
FP32_MAX = torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True)
class Format:
    """An 8-bit float: bits of its mantissa, exponent of its least normal number, its maximum."""

    mantissa: int
    least: int
    maximum: float


E4M3, E5M2 = Format(3, -6, 448.0), Format(2, -14, 57344.0)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, exactly, for exponents from -127 (which is subnormal) to 127."""
    normal = ((exponent.int().clamp_min(-126) + 127) << 23).view(torch.float32)
    return torch.where(exponent < -126, 2.0**-127, normal)


def cast(x: Tensor, kind: Format) -> Tensor:
    """fp32 rounded to the nearest number of ``kind``, ties to even; beyond its maximum, that."""
    x = x.clamp(-kind.maximum, kind.maximum)
    exponent = torch.frexp(x).exponent - 1  # 2^exponent <= |x|
    step = power_of_two(exponent.clamp_min(kind.least) - kind.mantissa)
    return torch.round(x / step) * step


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A matrix of 8-bit floats: its codes' values, and the inverses of their scales.

    ``tile``: rows and columns that share a scale; None: one scale for all.
    """

    codes_RK: Tensor
    inverse: Tensor
    tile: tuple[int, int] | None

    def spread(self) -> Tensor:
        """The inverse scale of each element; one number where they share it."""
        if self.tile is None:
            return self.inverse
        rows, columns = self.codes_RK.shape
        inverse = self.inverse.repeat_interleave(self.tile[0], 0)[:rows]
        return inverse.repeat_interleave(self.tile[1], 1)[:, :columns]

    @property
    def turned(self) -> Quantised:
        """The same numbers, for a product over the rows."""
        tile = None if self.tile is None else (self.tile[1], self.tile[0])
        inverse = self.inverse if self.tile is None else self.inverse.T
        return Quantised(self.codes_RK.T, inverse, tile)


def product(a_RK: Quantised, b_CK: Quantised, dtype: torch.dtype) -> Tensor:
    """``a @ b.T`` of the numbers meant, summed in fp32 (or fp64), rounded once to ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out: Tensor | float = 1.0
    factors = []
    for one in (a_RK, b_CK):
        codes, inverse = one.codes_RK.to(wide), one.spread().to(wide)
        factors.append(codes if one.tile is None else codes * inverse)
        out = out * inverse if one.tile is None else out
    return (factors[0] @ factors[1].T * out).to(dtype)


class Recipe:
    """How operands are quantised."""

    def __init__(self, config: Fp8Config) -> None:
        self.config, self.kind = config, config.recipe
        hybrid = config.format == "hybrid"
        if config.format == "auto":
            hybrid = self.kind in ("delayed", "current")
        self.formats = {"x": E4M3, "w": E4M3, "g": E5M2 if hybrid else E4M3}

    def tile(self, operand: Operand) -> tuple[int, int] | None:
        """What shares a scale; None: the tensor."""
        tiles = {"block": (128 if operand == "w" else 1, 128), "mxfp8": (1, 32)}
        return tiles.get(self.kind)

    def quantise(self, x_RK: Tensor, operand: Operand, scale: Tensor | None = None) -> Quantised:
        """For a product over K; ``scale``: of delayed scaling, where it is known."""
        x_RK, kind, tile = x_RK.float(), self.formats[operand], self.tile(operand)
        if tile is None:
            scale = tensor_scale(amax(x_RK), kind) if scale is None else scale
            return Quantised(cast(x_RK * scale, kind), 1.0 / scale, None)
        (rows, columns), (high, wide) = x_RK.shape, tile
        filled = F.pad(x_RK, (0, -columns % wide, 0, -rows % high))
        tiles: Tensor = filled.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        amax_rk = tiles.abs().amax(dim=(1, 3))
        if self.kind == "mxfp8":
            exponent = mx_exponent(amax_rk, kind)
            scale_rk, inverse_rk = power_of_two(-exponent), power_of_two(exponent)
        else:
            scale_rk = block_scale(amax_rk, kind)
            inverse_rk = 1.0 / scale_rk
        codes = cast(tiles * scale_rk[:, None, :, None], kind)
        codes_RK = codes.flatten(2, 3).flatten(0, 1)[:rows, :columns]
        return Quantised(codes_RK, inverse_rk, tile)

    def across(self, q: Quantised, x_RK: Tensor, operand: Operand) -> Quantised:
        """A matrix for a product over its rows: its tiles may lie the other way, of which none is
        quantised twice.
        """
        if q.tile is None or q.tile[0] == q.tile[1]:
            return q.turned
        return self.quantise(x_RK.T, operand)


# --- scales ---------------------------------------------------------------------------------------


def amax(x: Tensor) -> Tensor:
    """The largest magnitude, fp32."""
    return x.detach().abs().max().float() if x.numel() else torch.zeros((), device=x.device)


def tensor_scale(amax: Tensor, kind: Format, margin: int = 0) -> Tensor:
    """``max / 2^margin / amax``, at most what fp32 holds; 1 of zeros, infinities and NaN."""
    scale = torch.full_like(amax, kind.maximum / 2.0**margin) / amax
    scale = scale.clamp_max(FP32_MAX)
    return torch.where(amax.isfinite() & (amax > 0), scale, torch.ones_like(scale))


def block_scale(amax: Tensor, kind: Format) -> Tensor:
    """The same, rounded down to a power of two."""
    scale = tensor_scale(amax, kind)
    return power_of_two(torch.frexp(scale).exponent - 1)


def mx_exponent(amax: Tensor, kind: Format) -> Tensor:
    """``amax / max`` rounded up to a power of two that E8M0 has: its exponent."""
    value = amax * torch.tensor(1.0 / kind.maximum)
    found = torch.frexp(value)
    exponent = found.exponent - (found.mantissa == 0.5).int()
    exponent = torch.where(value == 0, -127, exponent)
    return torch.where(value.isinf(), 127, exponent).clamp(-127, 127)


# --- a layer --------------------------------------------------------------------------------------


class Layer:
    """One quantised linear layer: its scales, and what the update in progress has seen of it."""

    def __init__(self, path: str, recipe: Recipe, device: torch.device) -> None:
        self.path, self.recipe, self.active = path, recipe, True
        history = recipe.config.amax_history_len if recipe.kind == "delayed" else 0
        self.history_H3 = torch.zeros((history, 3), device=device)
        self.scale_3 = torch.ones(3, device=device)
        self.amax_3 = torch.zeros(3, device=device)
        self.sums: Sums | None = None  # while it is looked at

    def quantise(self, x_RK: Tensor, operand: Operand) -> Quantised:
        """By the recipe; with delayed scaling, by the history's scale once there is one."""
        i = OPERANDS.index(operand)
        scale = self.scale_3[i] if self.recipe.kind == "delayed" and self.known(i) else None
        return self.recipe.quantise(x_RK, operand, scale)

    def known(self, i: int) -> bool:
        """Whether an operand's scale comes from a history: a first tensor has its own."""
        window = self.history_H3[:, i].nan_to_num(nan=0.0, posinf=torch.inf).max()
        return bool(self.scale_3[i] != 1) or bool(window.isfinite() & (window > 0))

    @torch.no_grad()
    def end_update(self) -> None:
        """Move the history on, and the scales that follow from it."""
        if self.recipe.kind == "delayed":
            config = self.recipe.config
            for i, operand in enumerate(OPERANDS):
                seen = self.amax_3[i]
                if seen == 0:  # not computed
                    continue
                window_H = torch.cat([self.history_H3[1:, i], seen[None]])
                basis = seen
                if config.amax_compute == "max":
                    basis = window_H.nan_to_num(nan=0.0, posinf=torch.inf).max()
                if basis.isfinite() and basis > 0:
                    kind = self.recipe.formats[operand]
                    self.scale_3[i] = tensor_scale(basis, kind, config.margin)
                window_H[0] = 0.0  # the place of the next
                self.history_H3[:, i] = window_H
        self.amax_3.zero_()


class Product(torch.autograd.Function):
    """``x @ w.T``, and its two products backward, on quantised operands; ``part``: whose share."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_OI: Tensor, layer: Layer, tell: Any) -> Tensor:
        ctx.save_for_backward(x_NI, w_OI)
        ctx.layer, ctx.tell = layer, tell
        return product(layer.quantise(x_NI, "x"), layer.quantise(w_OI, "w"), x_NI.dtype)

    @staticmethod
    def backward(ctx: Any, g_NO: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x_NI, w_OI = ctx.saved_tensors
        layer: Layer = ctx.layer
        recipe = layer.recipe
        qx, qw, qg = (
            layer.quantise(x_NI, "x"),
            layer.quantise(w_OI, "w"),
            layer.quantise(g_NO, "g"),
        )
        # dx = g w sums over outputs; dw = g^T x over tokens.
        across = {
            "x": recipe.across(qx, x_NI, "x"),
            "w": recipe.across(qw, w_OI, "w"),
            "g": recipe.across(qg, g_NO, "g"),
        }
        dx_NI = product(qg, across["w"], g_NO.dtype)
        dw_OI = product(across["g"], across["x"], g_NO.dtype)
        amax_3 = torch.stack([amax(x_NI), amax(w_OI), amax(g_NO)])
        layer.amax_3 = torch.maximum(layer.amax_3, amax_3)
        inverses = {"x": qx.inverse, "w": qw.inverse, "g": qg.inverse}
        if qx.tile is not None:
            inverses |= {f"{name}t": q.inverse for name, q in across.items()}
        ctx.tell(amax_3, inverses)
        if layer.sums is not None:
            y_NO = product(qx, qw, x_NI.dtype)
            layer.sums.add_products(
                (y_NO, x_NI @ w_OI.T), (dx_NI, g_NO @ w_OI), (dw_OI, g_NO.T @ x_NI)
            )
            layer.sums.add_operands(recipe, {"x": (x_NI, qx), "w": (w_OI, qw), "g": (g_NO, qg)})
        return dx_NI, dw_OI, None, None


class Sums:
    """What the sentinel adds up of a layer: errors of products, what operands lost."""

    def __init__(self) -> None:
        self.lost, self.whole = [0.0] * 3, [0.0] * 3  # squared, of y, dx, dw
        self.there, self.zero, self.cut = [0.0] * 3, [0.0] * 3, [0.0] * 3  # elements of x, w, g

    def add_products(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """Pairs of a product and its unquantised shadow."""
        for i, (found, shadow) in enumerate(pairs):
            self.lost[i] += float((found.double() - shadow.double()).square().sum())
            self.whole[i] += float(shadow.double().square().sum())

    def add_operands(self, recipe: Recipe, operands: dict[Any, tuple[Tensor, Quantised]]) -> None:
        """What is 2^-40 below the largest element counts as a zero of another order of summing."""
        for i, (name, (x, q)) in enumerate(operands.items()):
            there = x.abs() > amax(x) * 2.0**-40
            limit = recipe.formats[name].maximum * q.spread()
            self.there[i] += int(there.sum())
            self.zero[i] += int((there & (q.codes_RK == 0)).sum())
            self.cut[i] += int((x.float().abs() > limit).sum())

    def ratios(self) -> dict[str, float]:
        """The worst product's relative error; the worst operand's shares of what it lost."""
        errors = [(a / b) ** 0.5 for a, b in zip(self.lost, self.whole) if b]
        shares = {
            name: [a / b for a, b in zip(found, self.there) if b]
            for name, found in (("underflow", self.zero), ("overflow", self.cut))
        }
        return {"error": worst(errors), **{name: worst(found) for name, found in shares.items()}}


def worst(values: Sequence[float]) -> float:
    """The one furthest from 0; what is no number is worse than any."""
    return max(values, key=lambda v: math.inf if math.isnan(v) else abs(v), default=0.0)
