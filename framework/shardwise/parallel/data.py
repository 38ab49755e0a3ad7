"""ZeRO as a table over FSDP2 (design decision 5).

Gradients are sums over data ranks: FSDP2's division is switched off on every module, because the
loss contract divides once, by global counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shardwise.ops import comm
from shardwise.parallel.collectives import CountedAllGather, CountedReduceScatter
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.mixed_precision import ComputeCopies


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


# A CPU has no stream to hide a block's communication behind: without ZeRO-3, which saves memory by
# blocks, one exchange for the whole model means fewer moments to wait for peers.
SHARDED_WHOLE = frozenset(("cpu",))


def shard(
    model: nn.Module, mesh: Mesh, param_dtype: torch.dtype, *, by_block: bool = False
) -> None:
    """Wrap each block and the model in FSDP2, in place.

    A rank alone needs `mixed_precision.ComputeCopies` instead.

    Parameters stay fp32 (or fp64) shards; the gathered copies have ``param_dtype``; gradients are
    reduced in fp32 (fp64 for fp64 models). ``by_block``: a block's by themselves on any device.
    """
    row = ZERO[mesh.layout.zero]
    master = next(model.parameters()).dtype
    if mesh.alone:
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
    whole = mesh.device.type in SHARDED_WHOLE and not by_block
    if row.reshard_after_forward or not whole:
        for block in filter(None, model.layers):  # type: ignore[arg-type]
            wrap(block, reshard_after_forward=row.reshard_after_forward)
    # The embedding and the head are needed first and last: resharding them buys nothing.
    wrap(model, reshard_after_forward=False)
    model.fsdp_modules = [m for m in model.modules() if isinstance(m, FSDPModule)]  # type: ignore[assignment]
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if mesh.groups["shard"].size() > 1:
            module.set_custom_reduce_scatter(CountedReduceScatter())
            module.set_custom_all_gather(CountedAllGather())


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """All FSDP2 modules of ``model``, the root first."""
    return getattr(model, "fsdp_modules", [])


def reshard(model: nn.Module) -> None:
    """Free gathered weights, so that ``model.named_parameters()`` are the shards."""
    copies = getattr(model, "compute_copies", None)
    if copies is not None:
        copies.masters()
    for module in fsdp_modules(model):
        module.reshard()


def copy_of(models: Iterable[nn.Module], weight: nn.Parameter) -> nn.Parameter | None:
    """What computes in the weight's place between passes, too; None: nothing does."""
    made = (getattr(model, "compute_copies", None) for model in models)
    return next((c.copy_of[weight] for c in made if c and weight in c.copy_of), None)


def dtypes(model: nn.Module) -> tuple[torch.dtype | None, torch.dtype | None]:
    """In which dtype gathered weights compute, and in which gradients are summed over ranks.

    None: in that of the weights themselves.
    """
    copies = getattr(model, "compute_copies", None)
    if copies is not None:
        return copies.dtype, None
    if not isinstance(model, FSDPModule):
        return None, None
    policies = {group.mp_policy for group in _param_groups(model)}
    if not policies:  # it has not computed yet
        return None, None
    assert len(policies) == 1, "blocks and the model are wrapped alike"
    policy = policies.pop()
    return policy.param_dtype, policy.reduce_dtype or policy.param_dtype


def waiting_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Of gradients whole on this rank that the next micro-batch's will be added to."""
    if not isinstance(model, FSDPModule):
        return set()
    params = [param for group in _param_groups(model) for param in group.fsdp_params]
    whole = [param._unsharded_param.grad for param in params if hasattr(param, "_unsharded_param")]
    found = [*whole, *(param.unsharded_accumulated_grad for param in params)]
    return {grad.dtype for grad in found if grad is not None}


def before_microbatch(model: nn.Module, mesh: Mesh, *, is_last: bool) -> None:
    """Say what the coming backward pass does with gradients and gathered weights."""
    if mesh.alone:
        return
    row = ZERO[mesh.layout.zero]
    _prepare(model, sync=is_last or row.sync_every_microbatch, last=is_last, row=row)
    if is_last or row.sync_every_microbatch:
        count_replicas(model, mesh)


def before_pipeline(model: nn.Module, mesh: Mesh) -> None:
    """In a pipeline no backward pass synchronises by itself: `after_backward` does."""
    if not mesh.alone:
        _prepare(model, sync=False, last=False, row=ZERO[mesh.layout.zero])


def after_backward(model: nn.Module, mesh: Mesh, *, is_last: bool) -> None:
    """A micro-batch's gradients are complete: fold them into fp32, and reduce them if it is time.

    FSDP2 would do so in hooks of a backward pass that ends with the weights; here gradients of
    weights may have been added by hand.
    """
    if mesh.alone:
        return
    row = ZERO[mesh.layout.zero]
    assert isinstance(model, FSDPModule)
    # All of them: those that a hook folded already and those that it did not find yet would be
    # of two dtypes.
    for group in _param_groups(model):
        for param in group.fsdp_params:
            if hasattr(param, "_unsharded_param"):
                param.accumulate_unsharded_grad_if_needed()
                param.to_accumulated_grad_if_needed()
    if not (is_last or row.sync_every_microbatch):
        return
    _prepare(model, sync=True, last=is_last, row=row)
    for group in _param_groups(model):
        group.post_backward()
    fully_shard.state(model)._root_post_backward_final_callback()  # type: ignore[attr-defined]
    count_replicas(model, mesh)
    if not is_last:
        before_pipeline(model, mesh)


def _prepare(model: nn.Module, *, sync: bool, last: bool, row: ZeroRow) -> None:
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(sync)
    # Without ZeRO-3 the gathered weights serve all micro-batches of the step.
    model.set_reshard_after_backward(last or row.reshard_after_forward)
    model.set_is_last_backward(last)


def _param_groups(model: nn.Module) -> list[Any]:
    states = fully_shard.state(model)._state_ctx.all_states  # type: ignore[attr-defined]
    return [group for state in states for group in state._fsdp_param_groups]


def count_replicas(model: nn.Module, mesh: Mesh) -> None:
    """Tell the tally of the all-reduce that FSDP2 makes itself, over the replicas of a shard.

    By the shards: the module's own parameters are gathered ones while micro-batches share them.
    """
    if mesh.groups["replicate"].size() == 1:
        return
    for module in fsdp_modules(model):
        groups = fully_shard.state(module)._fsdp_param_groups  # type: ignore[attr-defined]
        for parameter in (param.sharded_param for group in groups for param in group.fsdp_params):
            if parameter.requires_grad:
                comm.count("replicate", "all_reduce", parameter.to_local())
