"""Weights in a byte each: bit by bit bitsandbytes'."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.ops import int8
from tests.ops.test_nf4 import DTYPES, SIZES, weights


@settings(max_examples=40)
@given(SIZES, st.sampled_from(DTYPES), st.integers(0, 1000), st.booleans())
def test_bits_are_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, seed: int, zeros: bool
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = weights(shape, dtype, seed, zeros)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    ours = int8.quantise(weight)
    assert torch.equal(ours.codes_OI, codes) and torch.equal(ours.absmax_O, absmax)
    expected = functional.int8_vectorwise_dequant(codes, absmax)
    assert torch.equal(ours.dequantise(torch.float32), expected)
    half = ours.part(range(shape[0] // 2), range(1, shape[1])).dequantise(torch.float32)
    assert torch.equal(half, expected[: shape[0] // 2, 1:])


def test_what_fp16_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="fp16"):
        int8.quantise(torch.tensor([[1.0, 1e5]]))
