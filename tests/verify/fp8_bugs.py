"""Bugs of FP8 to plant, one at a time, by patching in the rank processes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from shardwise.ops import fp8
from shardwise.ops.fp8_linear import Site
from shardwise.precision.fp8 import Fp8
from shardwise.verify.walk import Task, Walked, walk

Plant = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Bug:
    """A mistake, and the recipe and layout in which it shows."""

    recipe: str
    layout: str
    plant: Plant


BUGS: dict[str, Bug] = {}


def bug(recipe: str, layout: str) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        BUGS[plant.__name__] = Bug(recipe, layout, plant)
        return plant

    return add


def walk_with(name: str, task: Task) -> Walked:
    """`walk.walk` with a bug planted; runs on every rank."""
    with contextlib.ExitStack() as stack:
        for patch in BUGS[name].plant():
            stack.enter_context(patch)
        return walk(task)


def _patch(target: Any, name: str, new: Any) -> Any:
    return mock.patch.object(target, name, new)


def _other_group(name: str) -> Any:
    """Finish every step with another group in the place of the right one."""
    real = Fp8.finish_step

    def finish_step(self: Any, step: int) -> Any:
        groups = self.mesh.groups | {"stage": self.mesh.groups[name]}
        with _patch(self, "mesh", dataclasses.replace(self.mesh, groups=groups)):
            return real(self, step)

    return _patch(Fp8, "finish_step", finish_step)


# --- delayed scaling ----------------------------------------------------------------------------


@bug("delayed", "dp2.zero2")
def amax_not_reduced_over_data_ranks() -> Iterator[Any]:
    yield _other_group("tp")


@bug("delayed", "tp2.sp")
def amax_reduced_over_the_wrong_group() -> Iterator[Any]:
    yield _other_group("dp")


@bug("delayed", "dp2.zero2")
def scale_updated_a_step_late() -> Iterator[Any]:
    real = fp8.delayed_update

    def delayed_update(history: Tensor, scale: Tensor, amax: Tensor, recipe: Any) -> Any:
        late = scale.clone() if not hasattr(history, "waiting") else scale
        new_history, new_scale = real(history, scale, amax, recipe)
        held = _HELD.get(id(history))
        _HELD[id(history)] = new_scale.clone()
        return new_history, late if held is None else held

    yield _patch(fp8, "delayed_update", delayed_update)


_HELD: dict[int, Tensor] = {}


@bug("delayed", "dp2.zero2")
def scale_never_updated() -> Iterator[Any]:
    real = fp8.delayed_update
    yield _patch(fp8, "delayed_update", lambda h, s, a, r: (real(h, s, a, r)[0], s))


@bug("delayed", "dp2.zero2")
def newest_amax_rolled_out_of_the_window() -> Iterator[Any]:
    real = fp8.delayed_update
    yield _patch(
        fp8, "delayed_update", lambda h, s, a, r: (torch.roll(h, 1, 1), real(h, s, a, r)[1])
    )


@bug("delayed", "dp2.zero1")
def amax_of_the_last_micro_batch_alone() -> Iterator[Any]:
    yield _patch(torch, "maximum", lambda old, new: new)


@bug("delayed", "dp2.zero2")
def gradient_in_e4m3_with_a_scale_for_e5m2() -> Iterator[Any]:
    real = fp8.quantise

    def quantise(x: Tensor, operand: Any, recipe: Any, scale: Any) -> Any:
        wrong = dataclasses.replace(recipe, backward=fp8.E4M3)
        return real(x, operand, wrong, scale)

    yield _patch(fp8, "quantise", quantise)


@bug("delayed", "dp2.zero2")
def gradient_scaled_as_the_input_is() -> Iterator[Any]:
    real = Site.scale
    yield _patch(Site, "scale", lambda self, o, amax: real(self, "x" if o == "g" else o, amax))


# --- scales of this tensor, of this tile ----------------------------------------------------------


@bug("current", "tp2")
def amax_of_another_ranks_weight() -> Iterator[Any]:
    real = Site.scale

    def scale(self: Any, operand: Any, amax: Tensor) -> Any:
        if operand == "w":
            torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX)
        return real(self, operand, amax)

    yield _patch(Site, "scale", scale)


@bug("current", "dp2.zero2")
def scale_in_the_place_of_its_inverse() -> Iterator[Any]:
    def quantise_tensor(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Any:
        return fp8.Quantised(fp8.cast(x.float() * scale, dtype), scale.float())

    yield _patch(fp8, "quantise_tensor", quantise_tensor)


@bug("block", "dp2.zero2")
def scales_of_tiles_transposed() -> Iterator[Any]:
    real = fp8.quantise_blocks

    def quantise_blocks(x: Tensor, block: Any, dtype: torch.dtype, **options: Any) -> Any:
        q = real(x, block, dtype, **options)
        rows, columns = q.scale_inv.shape
        swapped = q.scale_inv.T.reshape(rows, columns)
        return dataclasses.replace(q, scale_inv=swapped)

    yield _patch(fp8, "quantise_blocks", quantise_blocks)


@bug("block", "tp2.sp")
def scales_of_the_neighbouring_tile() -> Iterator[Any]:
    real = fp8.quantise_blocks

    def quantise_blocks(x: Tensor, block: Any, dtype: torch.dtype, **options: Any) -> Any:
        q = real(x, block, dtype, **options)
        return dataclasses.replace(q, scale_inv=q.scale_inv.roll(1, -1))

    yield _patch(fp8, "quantise_blocks", quantise_blocks)


@bug("mxfp8", "dp2.zero2")
def tiles_along_the_wrong_dimension() -> Iterator[Any]:
    def quantise_mx(x: Tensor, dtype: torch.dtype) -> Any:
        q = fp8.quantise_blocks(x.T, (1, fp8.MX_BLOCK), dtype)
        return fp8.Quantised(q.data_RK.T, q.scale_inv.T, (fp8.MX_BLOCK, 1))

    yield _patch(fp8, "quantise_mx", quantise_mx)


@bug("mxfp8", "pp2.zbv")
def shared_exponent_rounded_down() -> Iterator[Any]:
    real = fp8.e8m0_from_amax
    yield _patch(fp8, "e8m0_from_amax", lambda amax, dtype: real(amax / 2, dtype))
