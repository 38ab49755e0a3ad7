"""Norms, and numbers of heads, where tensor parallelism cuts what they see; see `tensor`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from shardwise.models.common.blocks import RMSNorm, Sinks, layer_norm_plus_one
from shardwise.ops.rms_norm import rms_norm
from shardwise.parallel import regions
from shardwise.parallel.swapped import Axis, Swapped, local

# Shape suffixes: B sequences, T tokens, D model width, O features of this rank's heads.


class EnteringNorm(Swapped):
    """A norm on whole activations, or on a part of them; in front of a region, it enters it.

    ``partial``: each rank's gradient is that of its own part.
    """

    def __init__(self, old: nn.Module, axis: Axis, *, enters: bool, partial: bool) -> None:
        super().__init__()
        assert isinstance(old, RMSNorm | nn.LayerNorm)
        self.axis, self.enters, self.eps = axis, enters, old.eps
        self.centred = isinstance(old, nn.LayerNorm)
        self.plus_one: bool = getattr(old, "plus_one", False)
        self.weight = axis.parameter(old.weight, Replicate())
        bias = getattr(old, "bias", None)
        self.bias = None if bias is None else axis.parameter(bias, Replicate())
        self.partial = ("weight", "bias") if partial else ()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; behind it, every rank has all tokens."""
        weight = local(self.weight)
        if self.centred:
            bias = None if self.bias is None else local(self.bias)
            if self.plus_one:
                y = layer_norm_plus_one(x, weight, bias, self.eps)
            else:
                y = F.layer_norm(x, weight.shape, weight, bias, self.eps)
        else:
            y = rms_norm(x, weight, self.eps, self.plus_one)
        return self.axis.enter(y) if self.enters else y


class Entering(nn.Module):
    """In place of no norm at all: what it is given enters the parallel region."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Behind it, every rank has all tokens."""
        return self.axis.enter(x_BTD)


class HeadsNorm(Swapped):
    """A norm over the features of all heads, of which each rank has some.

    Squares are summed over the ranks. A key head that several ranks have is counted once: by each
    of them in part; its weight is whole on every rank, and its gradient a partial sum.
    """

    def __init__(self, old: RMSNorm, axis: Axis, copies: int = 1) -> None:
        super().__init__()
        self.axis, self.eps, self.plus_one = axis, old.eps, old.plus_one
        self.width, self.copies = old.weight.numel(), copies
        shared = copies > 1
        self.weight = axis.parameter(old.weight, Replicate() if shared else Shard(0))
        self.partial = ("weight",) if shared else ()
        if shared:
            own = self.width * copies // axis.size
            start = axis.rank // copies * own
            self.rows = slice(start, start + own)

    def forward(self, x_BTO: Tensor) -> Tensor:
        """Normalise the last dimension, of which the ranks hold parts."""
        wide = torch.float64 if x_BTO.dtype == torch.float64 else torch.float32
        y_BTO, scale_O = x_BTO.to(wide), local(self.weight)[self.rows].to(wide)
        own = y_BTO.square().sum(-1, keepdim=True) / (self.width * self.copies)
        # The sum's gradient is a sum, too: every rank's features have a part in it.
        mean = regions.enter(regions.leave(own, self.axis.group), self.axis.group)
        y_BTO = y_BTO * torch.rsqrt(mean + self.eps)
        return (y_BTO * (1.0 + scale_O if self.plus_one else scale_O)).to(x_BTO.dtype)


class HeadNumbers(Swapped):
    """A number for each head, cut along the heads."""

    def __init__(self, old: Sinks, axis: Axis) -> None:
        super().__init__()
        self.weight = axis.parameter(old.weight, Shard(0))

    def forward(self) -> Tensor:
        """Those of this rank's heads."""
        return local(self.weight)
