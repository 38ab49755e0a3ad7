"""FP8 quantisers: scales, casts and products, as pure functions over real float8 tensors.

Rules of scaling follow Transformer Engine 2.x (its `compute_scale_from_amax`, its fused amax and
scale update, its MXFP8 cast), so that what is rehearsed here is what a GPU computes:

- per tensor (Micikevicius et al. 2022, "FP8 formats for deep learning"): one scale, from this
  tensor's amax (*current*) or from those of earlier steps (*delayed*);
- blocks (DeepSeek-V3, 2024, section 3.3.2): 1 x 128 tiles of activations and gradients along the
  dimension that a product sums over, 128 x 128 tiles of weights, scales rounded down to powers of
  two;
- MX (OCP Microscaling formats 1.0, section 5.2; Mishra et al. 2025, "Recipes for pre-training LLMs
  with MXFP8"): 1 x 32 tiles with E8M0 scales, rounded up so that no element saturates.

A *scale* multiplies before the cast, its inverse is kept beside the data. Casts saturate.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops import fp8_kernels

# Shape suffixes: R rows, C rows of the other operand, K what a product sums over; r and k blocks
# along them; S linear layers, H steps of history.

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
MAX = {E4M3: 448.0, E5M2: 57344.0}
FP32_MAX = torch.finfo(torch.float32).max
BLOCK, MX_BLOCK = 128, 32

# What widths must be multiples of: whole tiles, or what an FP8 product on a GPU needs.
WIDTHS = {"delayed": 16, "current": 16, "block": BLOCK, "mxfp8": MX_BLOCK}

Scaling = Literal["delayed", "current", "block", "mxfp8"]
Operand = Literal["x", "w", "g"]  # input, weight, gradient of the output
OPERANDS: tuple[Operand, ...] = ("x", "w", "g")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the three operands of a linear layer are quantised."""

    scaling: Scaling
    forward: torch.dtype = E4M3
    backward: torch.dtype = E5M2
    history: int = 1024  # delayed: steps whose amax counts
    margin: int = 0  # delayed: the scale is 2^margin smaller
    compute: Literal["max", "most_recent"] = "max"  # delayed: which of the history

    def dtype(self, operand: Operand) -> torch.dtype:
        """The float8 type of an operand."""
        return self.backward if operand == "g" else self.forward

    def block(self, operand: Operand) -> tuple[int, int] | None:
        """The tile that shares a scale; None: the tensor."""
        if self.scaling == "block":
            return (BLOCK if operand == "w" else 1, BLOCK)
        return (1, MX_BLOCK) if self.scaling == "mxfp8" else None


# --- scales -------------------------------------------------------------------------------------


def scale_from_amax(
    amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False, eps: float = 0.0
) -> Tensor:
    """``max(dtype) / amax`` in fp32; 1 where the amax is 0 or not finite.

    A scale that fp32 cannot hold becomes its maximum. ``power_of_two`` drops the scale's mantissa,
    which rounds it down.
    """
    amax = amax.float().clamp_min(eps)
    # One division: torch computes a number over a tensor as a product with its reciprocal.
    scale = torch.full_like(amax, MAX[dtype]) / amax
    scale = torch.where(scale.isinf(), FP32_MAX, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


def delayed_update(
    history_SH3: Tensor, scale_S3: Tensor, amax_S3: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """History and scales after a step whose amaxes are known.

    The history is a window of ``recipe.history`` steps, the newest at its end, with a free place
    in front (of a window of one step, nothing but that place remains).
    ``scale = max(dtype) / 2^margin / amax`` of the window (or of the newest); an operand that was
    not seen (amax 0) keeps both; an amax that is not finite keeps the scale.
    """
    seen_S3 = amax_S3 != 0
    rolled_SH3 = torch.roll(history_SH3, -1, dims=1)
    rolled_SH3[:, -1] = amax_S3
    # torch's maximum would pass NaN on; CUDA's fmaxf, and so the library, forgets it.
    window_S3 = rolled_SH3.nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1)
    rolled_SH3[:, 0] = 0.0
    basis_S3 = window_S3 if recipe.compute == "max" else amax_S3
    limits = [MAX[recipe.dtype(o)] * 2.0**-recipe.margin for o in OPERANDS]
    new_S3 = basis_S3.new_tensor(limits) / basis_S3
    new_S3 = torch.where(new_S3.isinf(), FP32_MAX, new_S3)
    usable_S3 = seen_S3 & basis_S3.isfinite() & (basis_S3 > 0)
    return (
        torch.where(seen_S3[:, None], rolled_SH3, history_SH3),
        torch.where(usable_S3, new_S3, scale_S3),
    )


def e8m0_from_amax(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The shared exponent of a tile: ``amax / max(dtype)`` rounded up to a power of two.

    The OCP formula, ``2^(floor(log2 amax) - emax)``, would let elements above ``max(dtype)``
    saturate. 0 gives the smallest scale, infinity the largest, NaN NaN.
    """
    value = amax.float().contiguous() * torch.tensor(1.0 / MAX[dtype], device=amax.device)
    bits = value.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    code = exponent + up.int()
    code = torch.where(value.isinf(), 0xFE, code)
    return torch.where(value.isnan(), 0xFF, code).to(torch.uint8).view(E8M0)


def _e8m0_reciprocal(code: Tensor) -> Tensor:
    """1 / scale in fp32, exactly; 2^-127 is subnormal."""
    bits = code.view(torch.uint8).int()
    value = ((254 - bits).clamp_min(0) << 23).view(torch.float32)
    value = torch.where(bits == 254, 2.0**-127, value)
    return torch.where(bits == 255, torch.nan, value)


# --- tensors ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A float8 matrix and the inverses of its scales.

    ``scale_inv`` is fp32: one number, or one a tile of ``block`` (at the edges, smaller tiles);
    for MX, E8M0.
    """

    data_RK: Tensor
    scale_inv: Tensor
    block: tuple[int, int] | None = None

    def transposed(self) -> Quantised | None:
        """The same numbers for a product over the rows; None where their tiles lie across."""
        if self.block is None:
            return Quantised(self.data_RK.T, self.scale_inv)
        if self.block[0] == self.block[1]:
            return Quantised(self.data_RK.T, self.scale_inv.T, self.block)
        return None

    def spread(self) -> Tensor:
        """``scale_inv`` for each element, in fp32; one number for a tensor's."""
        scale = self.scale_inv.float()
        if self.block is None:
            return scale
        rows, columns = self.data_RK.shape
        scale = scale.repeat_interleave(self.block[0], 0)[:rows]
        return scale.repeat_interleave(self.block[1], 1)[:, :columns]

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that this stands for, RK."""
        return (values(self.data_RK, torch.float32) * self.spread()).to(dtype)


@functools.cache
def _table(kind: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(kind)
    return codes.float().to(dtype)


def values(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Float8 elements in a wider type, exactly; a table is several times faster than a cast."""
    flat = data.contiguous().view(torch.uint8).reshape(-1).int()
    return _table(data.dtype, dtype, data.device).index_select(0, flat).view(data.shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 to the nearest even float8; saturate, infinities too; NaN stays."""
    return x.clamp(-MAX[dtype], MAX[dtype]).to(dtype)


def amax(x: Tensor) -> Tensor:
    """The largest magnitude, fp32; 0 of nothing."""
    return x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def quantise_tensor(x_RK: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantised:
    """One scale for the tensor."""
    return Quantised(cast(x_RK.float() * scale, dtype), scale.float().reciprocal())


def quantise_blocks(
    x_RK: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    *,
    power_of_two: bool = True,
    eps: float = 0.0,
) -> Quantised:
    """One fp32 scale a tile, from the tile's amax."""
    tiles = _tiles(x_RK.float(), block)
    scale_rk = scale_from_amax(
        tiles.abs().amax(dim=(1, 3)), dtype, power_of_two=power_of_two, eps=eps
    )
    data = cast(tiles * scale_rk[:, None, :, None], dtype)
    return Quantised(_untile(data, x_RK.shape), scale_rk.reciprocal(), block)


def quantise_mx(x_RK: Tensor, dtype: torch.dtype) -> Quantised:
    """One power of two (E8M0) for 32 neighbours along K."""
    block = (1, MX_BLOCK)
    tiles = _tiles(x_RK.float(), block)
    scale_rk = e8m0_from_amax(tiles.abs().amax(dim=(1, 3)), dtype)
    data = cast(tiles * _e8m0_reciprocal(scale_rk)[:, None, :, None], dtype)
    return Quantised(_untile(data, x_RK.shape), scale_rk, block)


def _tiles(x_RK: Tensor, block: tuple[int, int]) -> Tensor:
    """Tiles as (row of tiles, row, column of tiles, column), zeros beyond the edges."""
    (rows, columns), (high, wide) = x_RK.shape, block
    x_RK = F.pad(x_RK, (0, -columns % wide, 0, -rows % high))
    tiles: Tensor = x_RK.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    return tiles


def _untile(tiles: Tensor, shape: torch.Size) -> Tensor:
    return tiles.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]].contiguous()


def quantise(x_RK: Tensor, operand: Operand, recipe: Recipe, scale: Tensor | None) -> Quantised:
    """By recipe, for a product over K; ``scale`` only where one scale serves the tensor."""
    dtype, block = recipe.dtype(operand), recipe.block(operand)
    if fp8_kernels.unusable(x_RK.device) is None:
        return _by_kernels(x_RK, dtype, block, recipe, scale)
    if block is None:
        assert scale is not None
        return quantise_tensor(x_RK, scale, dtype)
    if recipe.scaling == "mxfp8":
        return quantise_mx(x_RK, dtype)
    return quantise_blocks(x_RK, block, dtype)


def _by_kernels(
    x_RK: Tensor,
    dtype: torch.dtype,
    block: tuple[int, int] | None,
    recipe: Recipe,
    scale: Tensor | None,
) -> Quantised:
    kernels = fp8_kernels.kernels()
    if block is None:
        assert scale is not None
        data, _ = kernels.quantize_tensor(x_RK, scale, dtype)
        return Quantised(data, scale.float().reciprocal())
    if recipe.scaling == "mxfp8":
        data, codes = kernels.quantize_mx(x_RK, dtype)
        return Quantised(data, codes.view(E8M0), block)
    data, scale_inv = kernels.quantize_blocks(x_RK, dtype, block)
    return Quantised(data, scale_inv, block)


def product(a_RK: Quantised, b_CK: Quantised, dtype: torch.dtype) -> Tensor:
    """``a @ b.T`` (RC) of the quantised numbers, summed in fp32 (fp64) and rounded once.

    Scales of tiles multiply in front, exactly where they are powers of two; one scale for a tensor
    multiplies the sum, as it does on a GPU.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out_RC: Tensor = _factors(a_RK, wide) @ _factors(b_CK, wide).T
    for one in (a_RK, b_CK):
        if one.block is None:
            out_RC = out_RC * one.scale_inv
    return out_RC.to(dtype)


def _factors(q: Quantised, dtype: torch.dtype) -> Tensor:
    numbers = values(q.data_RK, dtype)
    return numbers if q.block is None else numbers * q.spread()
