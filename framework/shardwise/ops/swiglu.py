"""SwiGLU (Shazeer 2020, equation 6)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise, in the inputs' dtype."""
    return F.silu(gate) * up
