"""Weights in one byte each, with a scale a row (Dettmers et al. 2022, "LLM.int8()", section 2.1).

The numbers are those of bitsandbytes' `Int8Params`, bit by bit: a weight is rounded to fp16 first,
then to 127ths of its row's absmax. The product that follows is not the library's: `Linear8bitLt`
rounds activations too, and takes whole columns out by what other tokens of the batch hold, so that
a token's result would depend on its neighbours and its micro-batch. Here activations keep their
precision.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# Shape suffixes: O output features (rows), I input features.


@dataclasses.dataclass(frozen=True)
class Int8:
    """``codes_OI`` (int8) and ``absmax_O`` (fp32) of the whole rows."""

    codes_OI: Tensor
    absmax_O: Tensor

    def part(self, rows: range, columns: range) -> Int8:
        """Some rows and columns; scales stay those of whole rows."""
        codes_OI = self.codes_OI[rows.start : rows.stop, columns.start : columns.stop]
        return Int8(codes_OI, self.absmax_O[rows.start : rows.stop])

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """OI, multiplied in fp32."""
        return (self.codes_OI * self.absmax_O[:, None] * (1.0 / 127.0)).to(dtype)


def quantise(weight_OI: Tensor) -> Int8:
    """A matrix of floating-point numbers. Raises ValueError where fp16 cannot hold one."""
    half_OI = weight_OI.detach().to(torch.float16)
    if not bool(half_OI.isfinite().all()):
        raise ValueError("a weight is beyond fp16's 65,504, through which int8 is quantised")
    absmax_O = half_OI.abs().amax(dim=1).float()
    scaled_OI = half_OI * (127.0 / absmax_O[:, None])
    return Int8(scaled_OI.nan_to_num(nan=0.0).round().to(torch.int8), absmax_O)
