"""The quantisers under Triton's interpreter, bit by bit, and compiled for GPUs that have FP8."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this system")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardwise.ops import fp8, fp8_kernels
from shardwise_kernels import quantize

Call = Callable[..., Any]
FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
EVERY_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit; any NaN is like any other."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    both_nan = a.float().isnan() & b.float().isnan()
    bits = {1: torch.uint8, 4: torch.int32}[a.element_size()]
    return bool(((a.contiguous().view(bits) == b.contiguous().view(bits)) | both_nan).all())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-130, 3e30])
def test_every_bf16_number_is_rounded_as_by_torch(
    interpreted: Call, dtype: torch.dtype, scale: float
) -> None:
    factor, limit = torch.tensor(scale), torch.finfo(dtype).max
    q, amax = interpreted("quantize_tensor", EVERY_BF16, factor, dtype)
    assert same(q, (EVERY_BF16.float() * factor).clamp(-limit, limit).to(dtype))
    assert amax.isnan()
    finite = EVERY_BF16[EVERY_BF16.isfinite()]
    _, amax = interpreted("quantize_tensor", finite, factor, dtype)
    assert float(amax) == torch.finfo(torch.bfloat16).max


def _compile(
    kernel: Any, capability: int, types: dict[str, str], values: dict[str, Any], warps: int = 4
) -> Any:
    signature = types | dict.fromkeys(values, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
        )


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("kind", ["tensor", "1x128", "128x128", "mx"])
def test_compiles_for_gpus_with_fp8(capability: int, kind: str) -> None:
    assert not quantize._INTERPRETED  # the cast is the GPU's own
    shared = {"LARGEST": 448.0, "INTERPRETED": False}
    if kind == "tensor":
        types = {"x": "*bf16", "q": "*fp8e4nv", "scale": "*fp32", "amax": "*i32", "size": "i32"}
        done = _compile(
            quantize.quantize_tensor_kernel, capability, types, {"TILE": 4096, **shared}
        )
    else:
        scales = "*u8" if kind == "mx" else "*fp32"
        types = {"x": "*bf16", "q": "*fp8e4nv", "scales": scales}
        types |= dict.fromkeys(("M", "N", "stride_m", "stride_n", "scales_stride"), "i32")
        square = kind == "128x128"
        values = {
            "TILE_M": 128 if square else 32,
            "TILE_N": 32 if kind == "mx" else 128,
            "SQUARE": square,
            "POWER_OF_TWO": True,
            "MX": kind == "mx",
        }
        done = _compile(
            quantize.quantize_blocks_kernel, capability, types, values | shared, 8 if square else 4
        )
    assert done.asm["cubin"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in done.asm["ptx"]


def test_nothing_is_left_of_an_empty_tensor(interpreted: Call) -> None:
    q, amax = interpreted("quantize_tensor", torch.empty(0), torch.tensor(1.0), FORMATS[0])
    assert q.shape == (0,) and float(amax) == 0.0
    q, scales = interpreted("quantize_mx", torch.empty(0, 32), FORMATS[0])
    assert q.shape == (0, 32) and scales.shape == (0, 1)


@pytest.mark.parametrize("dtype", FORMATS)
def test_blocks_by_hand(interpreted: Call, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    x = torch.zeros(3, 200)
    x[0, 5], x[1, 130], x[2, 199] = limit, -3.0 * limit, 1.5 * limit
    for block, expected in {
        (1, 128): [[1.0, 1.0], [1.0, 3.0], [1.0, 1.5]],
        (128, 128): [[1.0, 3.0]],
    }.items():
        q, scales = interpreted("quantize_blocks", x, dtype, block, power_of_two=False)
        torch.testing.assert_close(scales, torch.tensor(expected), atol=0, rtol=1e-6)
        whole = scales.repeat_interleave(128, 1)[:, :200].expand_as(x)
        torch.testing.assert_close(q.float() * whole, x, atol=1e-9, rtol=1e-6)
        _, rounded = interpreted("quantize_blocks", x, dtype, block)
        exponents = [[math.ceil(math.log2(v)) for v in row] for row in expected]
        assert rounded.log2().tolist() == exponents
    # Columns of a matrix are the rows of its transposed view.
    q_T, scales_T = interpreted("quantize_blocks", x.T, dtype, (1, 128))
    assert q_T.shape == (200, 3) and scales_T.shape == (200, 1)
    again, _ = interpreted("quantize_blocks", x.T.contiguous(), dtype, (1, 128))
    assert same(q_T, again)


def _numbers(seed: int, rows: int, columns: int) -> Tensor:
    """Of many magnitudes; with zeros, a block of zeros, infinities, a NaN and subnormal numbers."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g)
    x *= torch.logspace(-44, 36, rows)[torch.randperm(rows, generator=g)][:, None]
    x[:, ::17] = 0.0
    x[3, :32] = 0.0
    x[5, 2], x[7, -1], x[11, 0] = torch.inf, -torch.inf, torch.nan
    return x


@pytest.mark.parametrize("recipe", ["delayed", "block", "mxfp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_reference(
    interpreted: Call, monkeypatch: pytest.MonkeyPatch, recipe: fp8.Scaling, dtype: torch.dtype
) -> None:
    """The dispatch of `ops.fp8` on a GPU, but for the kernels' interpreter."""
    module = SimpleNamespace(
        **{
            name: functools.partial(interpreted, name)
            for name in ("quantize_tensor", "quantize_blocks", "quantize_mx")
        }
    )
    how = fp8.Recipe(recipe)
    for seed, (rows, columns) in enumerate([(140, 36), (12, 257)]):
        x = _numbers(seed, rows, columns).to(dtype)
        for operand in fp8.OPERANDS:
            for view in (x, x.T):
                want = fp8.quantise(view, operand, how, torch.tensor(0.37))
                with monkeypatch.context() as patch:
                    patch.setattr(fp8_kernels, "unusable", lambda device: None)
                    patch.setattr(fp8_kernels, "kernels", lambda: module)
                    got = fp8.quantise(view, operand, how, torch.tensor(0.37))
                assert got.block == want.block
                assert same(got.data_RK, want.data_RK)
                assert same(got.scale_inv, want.scale_inv)


def test_the_reason_for_the_reference() -> None:
    assert "CUDA only" in str(fp8_kernels.unusable(torch.device("cpu")))
