"""Root-mean-square norm (Zhang and Sennrich 2019, equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor

# Shape suffixes: D features.


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """Normalise the last dimension of ``x``; result in the dtype of ``x``.

    ``plus_one``: the scale is ``1 + weight_D``.

    Computed in fp32, or in fp64 for fp64 inputs. The weight is applied before rounding to the
    dtype of ``x``, so bf16 rounds once.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    scale_D = weight_D.to(wide)
    return (y * (1.0 + scale_D if plus_one else scale_D)).to(x.dtype)
