"""ZeRO as a table over FSDP2 (design decision 5).

Gradients are sums over data ranks: FSDP2's division is switched off on every module, because the
loss contract divides once, by global counts.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shardwise.parallel.collectives import AllToAllGather, AllToAllReduceScatter
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.single import ComputeCopies


@dataclasses.dataclass(frozen=True)
class ZeroRow:
    """What one ZeRO stage does with gathered weights and with gradients."""

    reshard_after_forward: bool
    sync_every_microbatch: bool


# zero0 is zero1 with a shard group of one rank: nothing is sharded, gradients are all-reduced.
ZERO = {
    0: ZeroRow(reshard_after_forward=False, sync_every_microbatch=False),
    1: ZeroRow(reshard_after_forward=False, sync_every_microbatch=False),
    2: ZeroRow(reshard_after_forward=False, sync_every_microbatch=True),
    3: ZeroRow(reshard_after_forward=True, sync_every_microbatch=True),
}


def shard(model: nn.Module, mesh: Mesh, param_dtype: torch.dtype) -> None:
    """Wrap each block and the model in FSDP2, in place; one rank needs `single.ComputeCopies`.

    Parameters stay fp32 (or fp64) shards; the gathered copies have ``param_dtype``; gradients are
    reduced in fp32 (fp64 for fp64 models).
    """
    row = ZERO[mesh.layout.zero]
    master = next(model.parameters()).dtype
    if mesh.layout.world == 1:
        if param_dtype != master:
            model.compute_copies = ComputeCopies(model, param_dtype)  # type: ignore[assignment]
        return
    policy = MixedPrecisionPolicy(
        param_dtype=None if param_dtype == master else param_dtype,
        reduce_dtype=master,
        # Rotary tables and masks keep their own dtypes.
        cast_forward_inputs=False,
    )
    wrap = functools.partial(fully_shard, mesh=mesh.fsdp, mp_policy=policy)
    # A CPU has no stream to hide a block's communication behind: without ZeRO-3, which saves
    # memory by blocks, one exchange for the whole model means fewer moments to wait for peers.
    if row.reshard_after_forward or mesh.device.type != "cpu":
        for block in model.layers:  # type: ignore[union-attr]
            wrap(block, reshard_after_forward=row.reshard_after_forward)
    # The embedding and the head are needed first and last: resharding them buys nothing.
    wrap(model, reshard_after_forward=False)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if mesh.device.type == "cpu" and mesh.shard_group.size() > 1:
            module.set_custom_reduce_scatter(AllToAllReduceScatter())
            module.set_custom_all_gather(AllToAllGather())


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """All FSDP2 modules of ``model``, the root first."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free gathered weights, so that ``model.named_parameters()`` are the shards."""
    copies = getattr(model, "compute_copies", None)
    if copies is not None:
        copies.masters()
    for module in fsdp_modules(model):
        module.reshard()


def before_microbatch(model: nn.Module, mesh: Mesh, *, is_last: bool) -> None:
    """Say what the coming backward pass does with gradients and gathered weights."""
    if mesh.layout.world == 1:
        return
    row = ZERO[mesh.layout.zero]
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(is_last or row.sync_every_microbatch)
    # Without ZeRO-3 the gathered weights serve all micro-batches of the step.
    model.set_reshard_after_backward(is_last or row.reshard_after_forward)
    model.set_is_last_backward(is_last)
