"""What `spmd_types` has to be told of the native engine, so that it types one training step.

A type says of each mesh axis whether a tensor is the same on all ranks (R, whose gradient is a
partial sum, or I, whose gradient is whole), differs (V), or is a partial sum (P). Told are: the
types of weights, gradients and batches; for which collective an autograd Function stands, in either
pass; and where sums are taken of local values. Of FSDP2 only the reduction of gradients is looked
into. Pipelines and context parallelism have no rules here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import I, P, R, S, V, rules
from spmd_types import _checker as checker
from spmd_types.types import normalize_axis
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from shardwise.data.batch import MicroBatch
from shardwise.engines import named_parameters, reduction
from shardwise.engines.native import NativeEngine
from shardwise.models.common.init import plain_name
from shardwise.ops import comm, cross_entropy, linear
from shardwise.parallel import collectives, data, regions, tensor
from shardwise.parallel.full_tensor import local_tensor, tp_dim

Types = dict[Any, Any]  # kind by axis, as a group or as the checker's own

# --- autograd Functions --------------------------------------------------------------------------


def _product(*, x: Tensor, weight_OI: Tensor) -> Any:
    return rules.einsum("...i,oi->...o", x, weight_OI)


def _logprobs(*, logits_NV: Tensor, targets_N: Tensor, shard: Any) -> Any:
    picked = rules.einsum("nv,n->n", logits_NV, targets_N)
    return picked if shard is None else rules.all_reduce(picked, shard.group, src=V, dst=I)


def _enter(*, x: Tensor, group: str) -> Any:
    return rules.convert(x, regions._GROUPS[group], src=I, dst=R)


def _leave(*, x: Tensor, group: str) -> Any:
    return rules.all_reduce(x, regions._GROUPS[group], src=V, dst=I)


def _gather(*, x_BtD: Tensor, group: str) -> Any:
    return rules.all_gather(x_BtD, regions._GROUPS[group], src=S(1), dst=R)


def _scatter(*, x_BTD: Tensor, group: str) -> Any:
    return rules.reduce_scatter(x_BTD, regions._GROUPS[group], src=V, dst=S(1))


BELIEVED = {linear._Linear: _product, cross_entropy._TokenLogprobs: _logprobs}
# By rule and, over the group, what the bodies must make of what: forward, and of the gradient.
REGIONS = {
    regions._Enter: (_enter, (I, I), (P, R)),
    regions._Leave: (_leave, (P, R), (I, I)),
    regions._GatherTokens: (_gather, (V, R), (P, V)),
    regions._ScatterTokens: (_scatter, (P, V), (V, R)),
}
# The types of an operator's arguments to that of its result.
OPERATORS = {
    Tensor.copy_: lambda old, new: new,
    Tensor.view_as: lambda x, like: x,
    Tensor.new_empty: lambda like: {},
}


def _through(x: Tensor, group: dist.ProcessGroup, kinds: Any, run: Callable[[Tensor], Any]) -> Any:
    """``run`` of ``x``, under the checker although autograd is under way."""
    mode = checker._current_mode()
    if mode is None or mode._disabled or group.size() == 1:
        return run(x)
    x = retype(x.detach(), {group: kinds[0]})
    with spmd.set_current_mesh([group]), mode:
        out = run(x)
        result = out[0] if isinstance(out, tuple) else out
        found = spmd.get_local_type(result).get(normalize_axis(group))
    if found is not kinds[1] and {found, kinds[1]} != {R, I}:  # the same, where no gradient is
        raise spmd.SpmdTypeError(f"{kinds[0]} became {found} instead of {kinds[1]}")
    del result._local_type  # the rule of the whole says it of all axes
    return out


def _forward(original: Any, kinds: Any, ctx: Any, x: Tensor, group: str, *rest: Any) -> Tensor:
    ctx.spmd_group = regions._GROUPS[group]
    return _through(x, ctx.spmd_group, kinds, lambda x: original(ctx, x, group, *rest))


def _backward(original: Any, kinds: Any, ctx: Any, grad: Tensor) -> Any:
    return _through(grad, ctx.spmd_group, kinds, lambda x: original(ctx, x))


# --- what tensors are ----------------------------------------------------------------------------


def retype(x: Tensor, types: Types) -> Tensor:
    """Say anew what a tensor is."""
    return checker._set_local_type(x, {normalize_axis(g): kind for g, kind in types.items()})


class Told:
    """The types of one engine's weights, gradients and batches."""

    def __init__(self, engine: NativeEngine) -> None:
        groups = engine.mesh.groups
        self.engine, self.mesh, self.partial = engine, engine.mesh, engine.named.partial
        self.tp = [groups["tp"]] if groups["tp"].size() > 1 else []
        self.data = [groups[a] for a in ("replicate", "shard") if groups[a].size() > 1]
        self.axes = [*self.data, *self.tp]

    def over_tp(self, name: str, parameter: Tensor) -> Types:
        """A weight that is whole on every rank: will its gradient be summed after the pass?"""
        kind = V if tp_dim(parameter, self.mesh) is not None else R if name in self.partial else I
        return dict.fromkeys(self.tp, kind)

    def weights(self) -> None:
        """Of those that are gathered now."""
        for raw_name, parameter in self.engine.model.named_parameters():
            types = self.over_tp(plain_name(raw_name), parameter) | dict.fromkeys(self.data, R)
            if isinstance(parameter, DTensor):
                parameter._told = types
            else:
                retype(parameter, types)

    def gradient(self, name: str, parameter: Tensor) -> Types:
        """After the backward pass: FSDP2 has summed over data ranks and cut; nobody over tp."""
        over_tp = {g: P if kind is R else kind for g, kind in self.over_tp(name, parameter).items()}
        return over_tp | {g: V if g is self.mesh.groups["shard"] else R for g in self.data}

    def batch(self, batch: MicroBatch) -> None:
        """Rows differ over data ranks."""
        types = dict.fromkeys(self.tp, R) | dict.fromkeys(self.data, V)
        batch.map(lambda x: retype(x, types))


# --- where the checker meets the engine ----------------------------------------------------------


def _local(parameter: Tensor) -> Tensor:
    """`tensor.local`, of the weight's type."""
    if not isinstance(parameter, DTensor):
        return parameter
    with spmd.no_typecheck():
        return retype(parameter.to_local(), parameter._told)


@torch.no_grad()
def _memory(x: Tensor) -> Tensor:
    """`local_tensor`, always the same one."""
    with spmd.no_typecheck():
        return local_tensor(x)


def _sum_over(original: Any, told: Told, values: Tensor, group: Any) -> Tensor:
    """A sum of local values: over each axis of the group they must differ."""
    if group is None or not spmd.is_type_checking():
        return original(values, group)
    ranks, types = set(dist.get_process_group_ranks(group)), dict(spmd.get_local_type(values))
    for axis in told.axes:
        if set(dist.get_process_group_ranks(axis)) <= ranks:
            kind = types.get(normalize_axis(axis))
            if kind not in (V, P):
                raise spmd.SpmdTypeError(f"a sum over ranks of what is {kind} there")
            types[normalize_axis(axis)] = R
    with spmd.no_typecheck():
        return retype(original(values, group), types)


def _moved(original: Any, kinds: Any, out: Tensor, inp: Tensor, group: Any, *rest: Any) -> Any:
    """A collective of `ops.comm`."""
    if not spmd.is_type_checking() or group.size() == 1 or not spmd.has_local_type(inp):
        return original(out, inp, group, *rest)
    types, axis = spmd.get_local_type(inp), normalize_axis(group)
    if types.get(axis) is not kinds[0]:
        raise spmd.SpmdTypeError(f"a collective of {types.get(axis)} that takes {kinds[0]}")
    with spmd.no_typecheck():
        original(out, inp, group, *rest).wait()
    return comm.Pending([], retype(out, types | {axis: kinds[1]}))


def _reduce_scatter(original: Any, told: Told, self: Any, **call: Any) -> None:
    """FSDP2's reduction: partial sums to this rank's part of the sum."""

    def run(x: Tensor) -> Tensor:
        original(self, **(call | {"input_tensor": x}))
        return call["output_tensor"]

    _through(call["input_tensor"], call["group"], (P, V), run)


def _read(original: Any, told: Told, x: Tensor) -> Any:
    """The host goes on with a number: it must be the same on every rank."""
    kinds = spmd.get_local_type(x).values()
    if spmd.is_type_checking() and (V in kinds or P in kinds):
        raise spmd.SpmdTypeError("the host reads a number that differs over ranks")
    return original(x)


def _pre_forward(original: Any, told: Told, self: Any, module: Any, args: Any, kwargs: Any) -> Any:
    """FSDP2 gathers weights, and passes arguments on as other tensors."""
    before = [spmd.get_local_type(x) if isinstance(x, Tensor) else {} for x in args]
    with spmd.no_typecheck():
        args, kwargs = original(self, module, args, kwargs)
    for x, types in zip(args, before, strict=True):
        if types:
            retype(x, types)
    told.weights()
    return args, kwargs


def _add(original: Any, told: Told, self: Any, *args: Any) -> Tensor:
    """The loss contract: what is differentiated is a part of the sum over data ranks."""
    out = original(self, *args)
    for group in told.data:
        spmd.mutate_type(out, group, src=V, dst=P)
    return out


def _finish(original: Any, told: Told, self: Any) -> None:
    """Gradients are taken over from the backward pass, and must be whole in the end."""
    grads = {n: _memory(p.grad) for n, p in self.parameters.items() if p.grad is not None}
    for name, grad in grads.items():
        retype(grad, told.gradient(name, self.parameters[name]))
    original(self)
    for name, grad in grads.items():
        if P in spmd.get_local_type(grad).values():
            raise spmd.SpmdTypeError(f"the gradient of {name} is still a partial sum")


def _unchecked(original: Any, told: Told, *args: Any, **kwargs: Any) -> Any:
    with spmd.no_typecheck():
        return original(*args, **kwargs)


def _mutate(original: Any, told: Told, func: Any, *args: Any) -> None:
    if func is not Tensor.copy_:  # which overwrites all
        original(func, *args)


@contextlib.contextmanager
def typed(engine: NativeEngine) -> Iterator[Told]:
    """Inside, `spmd_types` checks what ``engine`` does. Raises `SpmdTypeError` where it errs."""
    told = Told(engine)
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any, create: bool = False) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=create))

        def wrap(owner: Any, name: str, wrapper: Any, given: Any = told) -> None:
            original = getattr(owner, name)
            run = functools.wraps(original)(lambda *a, **k: wrapper(original, given, *a, **k))
            put(owner, name, staticmethod(run) if owner in REGIONS else run)

        for function, (rule, forward, backward) in REGIONS.items():
            put(function, "spmd_typecheck", staticmethod(rule), create=True)
            wrap(function, "forward", _forward, forward)
            wrap(function, "backward", _backward, backward)
        for function, rule in BELIEVED.items():
            put(function, "spmd_typecheck", staticmethod(rule), create=True)
        for name in ("_all_reduce", "_gather", "_scatter"):  # the operators' own Python
            put(regions, name, getattr(regions, name)._init_fn)
        wrap(regions, "_finish", _unchecked)
        wrap(comm, "all_gather", _moved, (V, R))
        wrap(comm, "reduce_scatter", _moved, (P, V))
        wrap(collectives.CountedReduceScatter, "__call__", _reduce_scatter)
        wrap(FSDPParamGroup, "pre_forward", _pre_forward)
        wrap(data, "before_microbatch", _unchecked)
        put(tensor, "local", _local)
        put(named_parameters, "local_tensor", _memory)
        wrap(named_parameters.NamedParameters, "finish_gradients", _finish)
        wrap(named_parameters, "sum_over", _sum_over)
        wrap(reduction, "sum_over", _sum_over)
        wrap(reduction.LossSums, "add", _add)
        # Figures: that one of several ranks speaks is nothing that types express.
        wrap(reduction.LossSums, "reduced", _unchecked)
        wrap(Tensor, "item", _read)
        wrap(Tensor, "tolist", _read)
        wrap(checker, "_validate_mutation_types", _mutate)
        stack.enter_context(mock.patch.dict(checker._DECOMP_TYPE_RULES, OPERATORS))
        told.weights()
        stack.enter_context(spmd.set_current_mesh(told.axes))
        stack.enter_context(checker.typecheck())
        yield told
