"""Where activations enter and leave a tensor-parallel region (Shoeybi et al. 2019, section 3).

Each function is a pair of collectives, one for the forward and its conjugate for the backward
pass; sequence parallelism (Korthikanti et al. 2022, section 4.2.2) replaces the all-reduces by
all-gathers and reduce-scatters along the tokens. The collectives are opaque operators, so blocks
that hold them compile without a break.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.ops import comm

# Shape suffixes: B sequences, T tokens, t = T / tp tokens of this rank, D features.

_GROUPS: dict[str, dist.ProcessGroup] = {}
AXIS = "tp"
Later = list[Callable[[], None]]
_span = torch.profiler.record_function  # the name under which a trace shows what is inside


def register(group: dist.ProcessGroup) -> str:
    """A name by which the operators below find ``group``."""
    _GROUPS[group.group_name] = group
    return group.group_name


@torch.library.custom_op("shardwise::tp_all_reduce", mutates_args=())
def _all_reduce(x: Tensor, group: str) -> Tensor:
    return comm.all_reduce(x.contiguous().clone(), _GROUPS[group], AXIS)


@_all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("shardwise::tp_gather", mutates_args=())
def _gather(x_BtD: Tensor, group: str, size: int) -> Tensor:
    x_tBD = x_BtD.transpose(0, 1).contiguous()
    out_TBD = x_tBD.new_empty((size * x_tBD.shape[0], *x_tBD.shape[1:]))
    comm.all_gather(out_TBD, x_tBD, _GROUPS[group], AXIS).wait()
    return out_TBD.transpose(0, 1).contiguous()


@_gather.register_fake
def _(x_BtD: Tensor, group: str, size: int) -> Tensor:
    b, t, *rest = x_BtD.shape
    return x_BtD.new_empty((b, size * t, *rest))


@torch.library.custom_op("shardwise::tp_scatter", mutates_args=())
def _scatter(x_BTD: Tensor, group: str, size: int) -> Tensor:
    out_tBD = _begin_scatter(x_BTD, group, size, async_op=False).wait()
    return out_tBD.transpose(0, 1).contiguous()  # type: ignore[no-any-return]


def _begin_scatter(x_BTD: Tensor, group: str, size: int, async_op: bool) -> comm.Pending:
    x_TBD = x_BTD.transpose(0, 1).contiguous()
    out_tBD = x_TBD.new_empty((x_TBD.shape[0] // size, *x_TBD.shape[1:]))
    return comm.reduce_scatter(out_tBD, x_TBD, _GROUPS[group], AXIS, async_op)


@_scatter.register_fake
def _(x_BTD: Tensor, group: str, size: int) -> Tensor:
    b, t, *rest = x_BTD.shape
    return x_BTD.new_empty((b, t // size, *rest))


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, later: Later | None) -> Tensor:
        ctx.group, ctx.later = group, later
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.later is None:
            return _all_reduce(grad, ctx.group), None, None
        with _span("shardwise::tp_all_reduce"):
            moving = comm.begin_all_reduce(grad.contiguous().clone(), _GROUPS[ctx.group], AXIS)
            _finish(ctx.later)
            return moving.wait(), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _all_reduce(x, group)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BtD: Tensor, group: str, size: int, later: Later | None) -> Tensor:
        ctx.group, ctx.size, ctx.later = group, size, later
        return _gather(x_BtD, group, size)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        if ctx.later is None:
            return _scatter(grad, ctx.group, ctx.size), None, None, None
        with _span("shardwise::tp_scatter"):
            moving = _begin_scatter(grad, ctx.group, ctx.size, async_op=True)
            _finish(ctx.later)
            return moving.wait().transpose(0, 1).contiguous(), None, None, None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _scatter(x_BTD, group, size)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _gather(grad, ctx.group, ctx.size), None, None


def _finish(later: Later) -> None:
    """Compute the weight products of the region while its gradient travels."""
    for product in later:
        product()
    later.clear()


def enter(x_BTD: Tensor, group: str, later: Later | None = None) -> Tensor:
    """Whole activations into parallel products: nothing, then an all-reduce of the gradient.

    ``later`` holds weight products by the time of the backward pass; they are computed while the
    gradient travels.
    """
    return _Enter.apply(x_BTD, group, later)  # type: ignore[no-any-return]


def leave(x_BTD: Tensor, group: str) -> Tensor:
    """Partial sums to whole activations: an all-reduce, then nothing."""
    return _Leave.apply(x_BTD, group)  # type: ignore[no-any-return]


def gather_tokens(x_BtD: Tensor, group: str, size: int, later: Later | None = None) -> Tensor:
    """This rank's tokens to all tokens; gradients are summed and cut again. See `enter`."""
    return _GatherTokens.apply(x_BtD, group, size, later)  # type: ignore[no-any-return]


def scatter_tokens(x_BTD: Tensor, group: str, size: int) -> Tensor:
    """Partial sums of all tokens to this rank's tokens, summed."""
    return _ScatterTokens.apply(x_BTD, group, size)  # type: ignore[no-any-return]
