"""A stand-in for Transformer Engine: a release's signatures, computed with the CPU emulation.

`installed` puts it where the adapter imports the library. What the real library asserts about its
arguments and what it does at its own pace (collectives inside its modules, scales that move on
when an autocast ends and after the first module's backward pass) is done alike.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardwise.ops import fp8
from shardwise.ops import transformer_engine as library
from shardwise.ops.fp8_linear import Site
from shardwise.ops.rms_norm import rms_norm
from shardwise.parallel import regions
from tests.contracts.signatures import checked, members, names

NAME = "transformer_engine"
KINDS = {
    "DelayedScaling": "delayed",
    "Float8CurrentScaling": "current",
    "Float8BlockScaling": "block",
    "MXFP8BlockScaling": "mxfp8",
}


class State:
    """What the library keeps globally: its `FP8GlobalStateManager`."""

    def __init__(self, part: int) -> None:
        self.part = part  # of a layer, which it tells whoever looks on
        self.enabled, self.recipe, self.group, self.depth = False, None, None, 0
        self.first = False
        self.modules: list[Module] = []
        self.calls: list[str] = []  # constructors, in order

    @contextlib.contextmanager
    def autocast(self, enabled: bool, recipe: Any, group: Any) -> Iterator[None]:
        before = self.enabled, self.recipe, self.group
        self.enabled, self.recipe, self.group = enabled, recipe, group
        if self.depth == 0:
            self.first = True
        self.depth += 1
        try:
            yield
        finally:
            self.enabled, self.recipe, self.group = before
            self.depth -= 1
            if enabled and self.depth == 0 and torch.is_grad_enabled():
                self.update(forward=True)

    def take_first(self) -> bool:
        was, self.first = self.first, False
        return was

    def update(self, forward: bool) -> None:
        """Reduce the amaxes of inputs and weights, or of gradients, and move scales on."""
        which = slice(0, 2) if forward else slice(2, 3)
        for module in self.modules:
            amax_3, meta = torch.zeros(3), module.fp8_meta
            amax_3[which] = module.site.amax_3[which]
            dist.all_reduce(amax_3, op=dist.ReduceOp.MAX, group=meta["fp8_group"])
            module.site.amax_3[which] = 0.0
            history, scale = module.memory()
            history, scale = fp8.delayed_update(
                history[None], scale[None], amax_3[None], module.site.recipe
            )
            module.remember(history[0], scale[0])


class Module(nn.Module):
    """What its Linear and LayerNormLinear share."""

    def __init__(self, state: State, release: str, *, norm: str | None, **given: Any) -> None:
        super().__init__()
        self.state, self.norm, self.given = state, norm, SimpleNamespace(**given)
        g = self.given
        assert g.parallel_mode in (None, "row", "column"), g.parallel_mode
        assert g.tp_size == 1 or g.tp_group is not None, "the group comes with the size"
        if g.tp_group is not None:
            assert g.tp_size == dist.get_world_size(g.tp_group)
        self.sequence = g.sequence_parallel and g.tp_size > 1
        rows = g.out_features // (g.tp_size if g.parallel_mode == "column" else 1)
        columns = g.in_features // (g.tp_size if g.parallel_mode == "row" else 1)
        shapes = {"weight": (rows, columns), "bias": (rows,) if g.bias else None}
        if norm is not None:
            assert norm in ("LayerNorm", "RMSNorm"), norm
            shapes["layer_norm_weight"] = (columns,)
            shapes["layer_norm_bias"] = (columns,) if norm == "LayerNorm" else None
        for name, shape in shapes.items():
            value = (
                None if shape is None else torch.empty(shape, dtype=g.params_dtype, device=g.device)
            )
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.shapes = shapes
        self.fp8_meta: dict[str, Any] = {}
        self.site: Any = None
        kind = "Linear" if norm is None else "LayerNormLinear"
        state.calls.append(kind)
        path = f"{NAME}.pytorch.{kind}.forward"
        self.forward = checked(NAME, path, release, self.compute)
        base = f"{NAME}.pytorch.module.base.TransformerEngineBaseModule.init_fp8_metadata"
        self.init_fp8_metadata = checked(NAME, base, release, self.prepare)

    def prepare(self, num_gemms: int = 1) -> None:
        state = self.state
        if not state.enabled:
            return
        assert state.recipe is not None
        if self.site is None:
            recipe = state.recipe
            self.fp8_meta |= {"recipe": recipe, "fp8_group": state.group}
            self.site = Site(
                self.given.name,
                recipe,
                torch.ones(3),
                torch.zeros(3),
                calibrated=(True,) * 3,
                part=state.part,
            )
            if recipe.scaling == "delayed":
                for key, number in (("scaling_fwd", 3), ("scaling_bwd", 2)):
                    self.fp8_meta[key] = SimpleNamespace(
                        scale=torch.ones(number), amax_history=torch.zeros(recipe.history, number)
                    )
                state.modules.append(self)

    def memory(self) -> tuple[Tensor, Tensor]:
        forward, backward = self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"]
        history = torch.cat([forward.amax_history[:, :2], backward.amax_history[:, :1]], 1)
        return history, torch.cat([forward.scale[:2], backward.scale[:1]])

    def remember(self, history_H3: Tensor, scale_3: Tensor) -> None:
        forward, backward = self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"]
        forward.amax_history[:, :2], backward.amax_history[:, :1] = (
            history_H3[:, :2],
            history_H3[:, 2:],
        )
        forward.scale[:2], backward.scale[:1] = scale_3[:2], scale_3[2:]

    def compute(self, inp: Tensor, **rest: Any) -> Tensor:
        assert not any(rest.values()), rest
        for name, shape in self.shapes.items():
            value = getattr(self, name)
            assert value is None or (value.dtype, value.shape) == (inp.dtype, shape), name
        self.prepare()
        g, x = self.given, inp
        group = regions.register(g.tp_group) if g.tp_size > 1 else ""
        if self.norm == "RMSNorm":
            x = rms_norm(x, self.layer_norm_weight, g.eps)
        elif self.norm is not None:
            weight = self.layer_norm_weight
            x = F.layer_norm(x, weight.shape, weight, self.layer_norm_bias, g.eps)
        if g.tp_size > 1 and g.parallel_mode == "column":
            x = (
                _first(regions.gather_tokens, x, group, g.tp_size)
                if self.sequence
                else regions.enter(x, group)
            )
        y = self.product(x)
        if g.tp_size > 1 and g.parallel_mode == "row":
            y = (
                _first(regions.scatter_tokens, y, group, g.tp_size)
                if self.sequence
                else regions.leave(y, group)
            )
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor) -> Tensor:
        if not self.state.enabled:
            return F.linear(x, self.weight)
        rows = x.numel() // x.shape[-1]
        assert rows % 8 == 0 and x.shape[-1] % 16 == 0, f"FP8 products need 8 x 16: {x.shape}"
        assert self.weight.shape[0] % 16 == 0, self.weight.shape
        if "scaling_fwd" in self.fp8_meta:
            self.site.scale_3 = self.memory()[1]
        y: Tensor = self.site.linear(x, self.weight, None)
        if torch.is_grad_enabled() and self.state.take_first():
            y = _AfterBackward.apply(y, self.state)
        return y


class _AfterBackward(torch.autograd.Function):
    """The first module's backward pass is the last: there the library updates gradients' scales."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, state: State) -> Tensor:
        ctx.state = state
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.state.update(forward=False)
        return grad, None


def _first(collective: Any, x: Tensor, group: str, size: int) -> Tensor:
    """A collective of ours that works on the second dimension, on the first."""
    out: Tensor = collective(x.transpose(0, 1), group, size).transpose(0, 1)
    return out


def _recipe(kind: str) -> Any:
    def build(fp8_format: str, **given: Any) -> fp8.Recipe:
        assert fp8_format in ("HYBRID", "E4M3")
        backward = fp8.E5M2 if fp8_format == "HYBRID" else fp8.E4M3
        if kind != "delayed":
            return fp8.Recipe(kind, backward=backward)  # type: ignore[arg-type]
        assert given["reduce_amax"]
        return fp8.Recipe(
            "delayed",
            backward=backward,
            history=given["amax_history_len"],
            margin=given["margin"],
            compute=given["amax_compute_algo"],
        )

    return build


def build(release: str, part: int) -> tuple[dict[str, ModuleType], State]:
    """The modules of a release, by dotted name; only what its signatures list is in them."""
    state = State(part)
    manager = SimpleNamespace()
    computes: dict[str, Any] = {
        "Linear": lambda **g: Module(state, release, norm=None, **g),
        "LayerNormLinear": lambda normalization, **g: Module(
            state, release, norm=normalization, **g
        ),
        "autocast": lambda enabled, recipe, amax_reduction_group, **_: state.autocast(
            enabled, recipe, amax_reduction_group
        ),
        "fp8_autocast": lambda enabled, fp8_recipe, fp8_group, **_: state.autocast(
            enabled, fp8_recipe, fp8_group
        ),
        "checkpoint": lambda function, args, kwargs: checkpoint(function, *args, **kwargs),
        "is_first_fp8_module": state.take_first,
        "reduce_and_update_fp8_tensors": state.update,
        **{kind: _recipe(scaling) for kind, scaling in KINDS.items()},
    }
    modules: dict[str, ModuleType] = {}

    def module(name: str) -> ModuleType:
        if name not in modules:
            modules[name] = ModuleType(name)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(module(parent), last, modules[name])
        return modules[name]

    for call in names(NAME, release):
        where, _, name = call.rpartition(".")
        if name == "Format":
            values = {n: n for n in members(NAME, call, release)}
            module(where).Format = SimpleNamespace(**values)  # type: ignore[attr-defined]
        elif name.startswith("check_"):
            setattr(module(where), name, checked(NAME, call, release, lambda: (True, "")))
        elif where.endswith("FP8GlobalStateManager"):
            setattr(manager, name, checked(NAME, call, release, computes[name]))
            module(where.rpartition(".")[0]).FP8GlobalStateManager = manager  # type: ignore[attr-defined]
        elif name in computes:
            setattr(module(where), name, checked(NAME, call, release, computes[name]))
    return modules, state


@contextlib.contextmanager
def installed(release: str, *, device: bool = True, part: int = 0) -> Iterator[State]:
    """The adapter finds that release in this process, and (``device``) may use it on any device."""
    modules, state = build(release, part)
    library._quantization.cache_clear()
    pytorch = modules[f"{NAME}.pytorch"]
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(library, "_library", lambda: (pytorch, "")),
        mock.patch.object(library, "unusable", _anywhere if device else library.unusable),
    ):
        yield state
    library._quantization.cache_clear()


def _anywhere(*args: Any, **kwargs: Any) -> None:
    """No reason against any device."""
