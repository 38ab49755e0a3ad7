"""The oracle's quantisers beside those that run: two ways to the same numbers."""

from __future__ import annotations

import pytest
import torch

from shardwise.engines.plain_quantised import as_quantised
from shardwise.ops import int8, nf4
from tests.ops.test_nf4 import DTYPES, weights, whole


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (32, 64), (5, 13), (300, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_both_read_back_the_same(dtype: torch.dtype, shape: tuple[int, int], zeros: bool) -> None:
    weight = weights(shape, dtype, seed=7, zeros=zeros)
    ours = nf4.quantise(weight).dequantise(whole(shape), torch.float32).view(shape)
    assert torch.equal(as_quantised(weight, "nf4"), ours.to(dtype))
    assert torch.equal(as_quantised(weight, "int8"), int8.quantise(weight).dequantise(dtype))
