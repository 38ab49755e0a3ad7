"""FP8 quantisers: one scale a tensor (given), a row of a block, or a square block.

Each kernel computes in fp32 what `shardwise.ops.fp8` defines, bit for bit, and writes FP8 values
and the scales that undo them. A transposed quantisation (for the products of a backward pass) is
the quantisation of a transposed view: strides are free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape suffixes: M rows, N columns; m, n numbers of blocks along them.

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_FLAT_TILE = 4096
_ROWS_AT_ONCE = 32


@triton.jit
def _round(y, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, NAN: tl.constexpr):
    """To the nearest FP8 number, ties to even, as an fp32 number (``y`` is within the range)."""
    bits = y.to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits >> 23) & 0xFF, LOWEST)  # below it, numbers are evenly spaced
    step = ((exponent - MANTISSA) << 23).to(tl.float32, bitcast=True)
    steps = tl.abs(y) * ((254 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    rounded = ((steps + 12582912.0) - 12582912.0) * step  # 1.5 * 2 ** 23 leaves no fraction
    rounded = tl.where(bits < 0, -rounded, rounded)
    return tl.where(y == y, rounded, NAN)


@triton.jit
def _as_float(value, INTERPRETED: tl.constexpr):
    if INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _store_fp8(pointers, y, mask, LARGEST: tl.constexpr, INTERPRETED: tl.constexpr):
    # Saturate: what does not fit becomes the largest number. A NaN stays one.
    y = tl.where(y > LARGEST, LARGEST, tl.where(y < -LARGEST, -LARGEST, y))
    if INTERPRETED:
        # The third: what would be stored as the bits of a NaN, were these a number's.
        y = _round(y, 3, 121, 480.0) if LARGEST < 1000.0 else _round(y, 2, 113, 114688.0)
    tl.store(pointers, y.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def quantize_tensor_kernel(
    x, q, scale, amax, size, LARGEST: tl.constexpr, TILE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """One tile of a tensor times ``scale``; ``amax`` (bits of an fp32, zero before) is raised."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < size
    value = _as_float(tl.load(x + at, mask=inside, other=0.0), INTERPRETED)
    # Bits of non-negative floats are ordered as integers; a NaN is above them all, and stays seen.
    tl.atomic_max(amax, tl.max(tl.abs(value).to(tl.int32, bitcast=True)))
    _store_fp8(q + at, value * tl.load(scale), inside, LARGEST, INTERPRETED)


@triton.jit
def _float_scale(amax, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """What to multiply by, for a block's amax: largest / amax, or the power of two below it."""
    known = (amax > 0.0) & (amax < float("inf"))
    scale = tl.math.div_rn(tl.full(amax.shape, LARGEST, tl.float32), tl.where(known, amax, 1.0))
    scale = tl.where(scale == float("inf"), 3.4028234663852886e38, scale)
    if POWER_OF_TWO:
        scale = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(known, scale, 1.0)


@triton.jit
def _e8m0(amax, LARGEST_INVERSE: tl.constexpr):
    """The biased exponent of the smallest power of two at or above amax / largest."""
    ratio = (amax * LARGEST_INVERSE).to(tl.int32, bitcast=True)
    exponent, mantissa = (ratio >> 23) & 0xFF, ratio & 0x7FFFFF
    up = (mantissa > 0) & (exponent < 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = tl.where(up, exponent + 1, exponent)
    exponent = tl.where(amax == float("inf"), 0xFE, exponent)
    return tl.where(amax != amax, 0xFF, exponent)


@triton.jit
def quantize_blocks_kernel(
    x,
    q,
    scales,
    M,
    N,
    stride_m,
    stride_n,
    scales_stride,
    LARGEST: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SQUARE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    MX: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A tile of blocks: each row of it is one, or (``SQUARE``) the whole."""
    block_m, block_n = tl.program_id(0), tl.program_id(1)
    m = block_m.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    n = block_n.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    value = tl.load(x + m[:, None] * stride_m + n[None, :] * stride_n, mask=inside, other=0.0)
    value = _as_float(value, INTERPRETED)
    # As integers, so that a NaN is the largest.
    amax = tl.max(tl.abs(value).to(tl.int32, bitcast=True), axis=1)
    if SQUARE:
        amax = tl.zeros_like(amax) + tl.max(amax, axis=0)
    amax = amax.to(tl.float32, bitcast=True)
    if MX:
        stored = _e8m0(amax, 1.0 / LARGEST)
        # 2 ** (127 - stored), of which the least is not a normal number.
        bits = tl.where(stored == 254, 0x00400000, (254 - stored) << 23)
        scale = tl.where(stored == 255, float("nan"), bits.to(tl.float32, bitcast=True))
        undo = stored.to(tl.uint8)
    else:
        scale = _float_scale(amax, LARGEST, POWER_OF_TWO)
        undo = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    _store_fp8(
        q + m[:, None] * N + n[None, :], value * scale[:, None], inside, LARGEST, INTERPRETED
    )
    if SQUARE:
        first = tl.arange(0, TILE_M) == 0
        tl.store(scales + block_m * scales_stride + block_n + tl.zeros_like(m), undo, mask=first)
    else:
        tl.store(scales + m * scales_stride + block_n, undo, mask=m < M)


# A GPU casts exactly, and rounds to nearest, ties to even. The interpreter does neither of what
# is below the normal numbers: there a kernel leaves its casts nothing to do.
_INTERPRETED = not isinstance(quantize_tensor_kernel, triton.JITFunction)


def quantize_tensor(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """FP8 of ``x * scale``, saturated, and the amax of ``x`` (fp32, no dimensions)."""
    x = x.contiguous()
    q, amax = torch.empty_like(x, dtype=dtype), x.new_zeros((), dtype=torch.int32)
    if x.numel():
        grid = (triton.cdiv(x.numel(), _FLAT_TILE),)
        quantize_tensor_kernel[grid](
            x,
            q,
            scale,
            amax,
            x.numel(),
            LARGEST=LARGEST[dtype],
            TILE=_FLAT_TILE,
            INTERPRETED=_INTERPRETED,
        )
    return q, amax.view(torch.float32)


def quantize_blocks(
    x_MN: Tensor, dtype: torch.dtype, block: tuple[int, int], *, power_of_two: bool = True
) -> tuple[Tensor, Tensor]:
    """FP8 of ``x`` by blocks 1 x W or W x W, and the fp32 scales (mn) that undo it.

    The scale of a block is largest / amax, or the power of two below it. Blocks at an edge may be
    smaller.
    """
    height, width = block
    assert height in (1, width), block
    return _blocks(x_MN, dtype, width, height > 1, power_of_two, torch.float32)


def quantize_mx(x_MN: Tensor, dtype: torch.dtype, width: int = 32) -> tuple[Tensor, Tensor]:
    """FP8 of ``x`` by blocks 1 x 32 and their E8M0 scales (uint8, Mn), as in OCP's MX formats.

    Exponents are rounded up, as Transformer Engine does, so nothing saturates.
    """
    return _blocks(x_MN, dtype, width, False, True, torch.uint8)


def _blocks(
    x_MN: Tensor,
    dtype: torch.dtype,
    width: int,
    square: bool,
    power_of_two: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    M, N = x_MN.shape
    q = torch.empty((M, N), dtype=dtype, device=x_MN.device)
    num_n = triton.cdiv(N, width)
    num_m = triton.cdiv(M, width) if square else M
    scales = torch.empty((num_m, num_n), dtype=scale_dtype, device=x_MN.device)
    rows = width if square else _ROWS_AT_ONCE
    if x_MN.numel():
        quantize_blocks_kernel[(triton.cdiv(M, rows), num_n)](
            x_MN,
            q,
            scales,
            M,
            N,
            x_MN.stride(0),
            x_MN.stride(1),
            num_n,
            LARGEST=LARGEST[dtype],
            TILE_M=rows,
            TILE_N=width,
            SQUARE=square,
            POWER_OF_TWO=power_of_two,
            MX=scale_dtype == torch.uint8,
            INTERPRETED=_INTERPRETED,
            num_warps=8 if square else 4,
        )
    return q, scales
