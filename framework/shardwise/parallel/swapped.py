"""What every module that takes a plain one's place has: the tp axis, local parts, its products."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard

from shardwise.ops.linear import Accumulate, linear
from shardwise.parallel import regions
from shardwise.parallel.mesh import Mesh

# Shape suffixes: B sequences, T tokens, D model width, I input and O output features.


@dataclasses.dataclass
class Axis:
    """The tp axis as the swapped modules see it."""

    mesh: Mesh
    group: str
    size: int
    rank: int
    sequence: bool
    overlap: bool  # of weight products with the collective behind them
    later: regions.Later | None = None  # weight products of the region that was entered last

    def parameter(self, old: Tensor, placement: Placement) -> nn.Parameter:
        """``old`` (whole, on the meta device) as this rank's part of a DTensor."""
        local = old.detach()
        if isinstance(placement, Shard):
            parts = list(local.chunk(self.size, dim=placement.dim))
            empty = local.narrow(placement.dim, 0, 0)
            local = parts[self.rank] if self.rank < len(parts) else empty
        value = DTensor.from_local(
            local.contiguous(),
            self.mesh.tp,
            [placement],
            run_check=False,
            shape=old.shape,
            stride=old.stride(),
        )
        return nn.Parameter(value, requires_grad=old.requires_grad)

    def leave(self, x_BTD: Tensor) -> Tensor:
        """Sum the ranks' partial results, and keep this rank's tokens of them."""
        if self.sequence:
            return regions.scatter_tokens(x_BTD, self.group, self.size)
        return regions.leave(x_BTD, self.group)

    def enter(self, x_BTD: Tensor) -> Tensor:
        """Make all tokens whole on every rank."""
        # Without a gradient to send back, nobody would compute what was left for later.
        self.later = [] if self.overlap and x_BTD.requires_grad else None
        if self.sequence:
            return regions.gather_tokens(x_BTD, self.group, self.size, self.later)
        return regions.enter(x_BTD, self.group, self.later)

    def own_tokens(self, x_BT: Tensor) -> Tensor:
        """This rank's slice of the second dimension under sequence parallelism, else all."""
        return x_BT.chunk(self.size, dim=1)[self.rank] if self.sequence else x_BT


def local(parameter: Tensor) -> Tensor:
    """The local part; its gradient comes back as a DTensor of the same placements."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# ``matmul(x, weight_OI, accumulate)``: ``x @ weight.T``; see `ops.linear.linear` for the last.
Matmul = Callable[[Tensor, Tensor, Accumulate | None], Tensor]


class Swapped(nn.Module):
    """A module whose `partial` parameters get partial sums as gradients on each rank.

    ``adapter(x, out, weight, rows)`` makes of a product over local parts an adapted one, see
    `shardwise.adapters`; ``rows`` are those of a whole weight that this rank uses.
    """

    partial: tuple[str, ...] = ()
    defer = False  # whether a schedule asks for weight products apart
    matmul: Matmul | None = None  # replaces the product over local parts, as FP8 does
    rows = slice(None)

    def __init__(self) -> None:
        super().__init__()
        self.adapter: Callable[..., Any] | None = None

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, later: regions.Later | None = None
    ) -> Tensor:
        """A linear layer over local parts; ``later`` takes its weight product."""
        add = None
        if self.defer or later is not None:
            add = Accumulate(functools.partial(_add_grad, weight), later)
        return self.multiply(x, local(weight), None if bias is None else local(bias), add)

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, add: Accumulate | None = None
    ) -> Tensor:
        """The same with parts in hand; with ``add``, the weight product can be deferred."""
        if self.matmul is None and self.adapter is None:
            return linear(x, weight, bias, add)
        out = linear(x, weight, None, add) if self.matmul is None else self.matmul(x, weight, add)
        if self.adapter is not None:
            out = self.adapter(x, out, weight, self.rows)
        return out if bias is None else out + bias

    def look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of a table in hand, adapted."""
        out = F.embedding(ids, table)
        return out if self.adapter is None else self.adapter(ids, out, table, self.rows)


def _add_grad(parameter: Tensor, grad: Tensor) -> None:
    """Accumulate a local gradient that no backward pass delivers, as autograd would."""
    if isinstance(parameter, DTensor):
        grad = DTensor.from_local(
            grad,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        hook(parameter)
