"""Initial weights: each parameter a pure function of (seed, its name, its global shape).

Numbers are drawn in blocks of rows, each from its own generator, so a rank makes its rows alone
and gets the same numbers as a process that makes the whole tensor. The scheme is GPT-2's: normal
with standard deviation 0.02, residual outputs scaled by 1 / sqrt(2 * num_layers), norms one,
biases zero (Radford et al. 2019, section 2.3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from shardwise.errors import CheckpointError
from shardwise.models.common.spec import ModelSpec
from shardwise.ops import rng
from shardwise.ops.local_shards import local_shards

_BLOCK_ELEMENTS = 1 << 18
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
_RESIDUAL_OUTPUTS = (".attn.o.weight", ".mlp.down.weight")
STD = 0.02


@dataclasses.dataclass(frozen=True)
class InitSpec:
    """How a parameter starts."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = STD


def init_spec(name: str, model: ModelSpec) -> InitSpec:
    """The scheme above, by parameter name."""
    if name.endswith("bias"):
        return InitSpec("zeros")
    if name.endswith("norm.weight"):  # a scale of one
        return InitSpec("zeros" if model.norm.plus_one else "ones")
    if name.endswith(_RESIDUAL_OUTPUTS):
        return InitSpec("normal", STD / math.sqrt(2 * len(model.layers)))
    return InitSpec("normal")


def init_tensor(
    name: str, shape: tuple[int, ...], spec: InitSpec, seed: int, rows: slice | None = None
) -> Tensor:
    """Rows ``rows`` (all by default) of the parameter's initial value, fp32 on CPU.

    Costs time and memory for these rows only, up to one block at either end.
    """
    num_rows, rest = shape[0], tuple(shape[1:])
    start, stop, _ = (rows or slice(None)).indices(num_rows)
    out = torch.empty((max(0, stop - start), *rest), device="cpu")
    if spec.kind != "normal":
        return out.fill_(1.0 if spec.kind == "ones" else 0.0)
    width = math.prod(rest)
    block = max(1, _BLOCK_ELEMENTS // max(1, width))
    generator = torch.Generator("cpu")
    for index in range(start // block, -(-stop // block) if stop > start else 0):
        generator.manual_seed(rng.key(seed, "init", name, *shape, index))
        first, last = index * block, min((index + 1) * block, num_rows)
        low, high = max(first, start), min(last, stop)
        # The block's rows, whichever are asked for: how many numbers are drawn changes which come.
        # (On CPU it changes the last 16. A small tensor needs no whole block.)
        count = (last - first) * width
        drawn = min(block * width, (count // 16 + 2) * 16)
        values = torch.randn(drawn, generator=generator, device="cpu")[:count]
        values = values.view(last - first, *rest)
        out[low - start : high - start] = values[low - first : high - first]
    return out.mul_(spec.std)


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes that recompute and compile wrappers add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@torch.no_grad()
def place(param: Tensor, rows_of: Callable[[slice], Tensor]) -> None:
    """Write a global value into a plain tensor, or this rank's part of it into a DTensor.

    ``rows_of(rows)`` makes the asked rows (slice of the first dimension) of the global value on
    CPU; only what this rank holds is asked for. No communication.
    """
    for region, view in local_shards("an initial weight", param.detach()):
        first, size = region.offset[0], region.shape[0]
        value = rows_of(slice(first, first + size))
        for dim in range(1, param.dim()):
            value = value.narrow(dim, region.offset[dim], region.shape[dim])
        view.copy_(value)


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter of a decoder, materialised already."""
    of_model: ModelSpec = model.spec  # type: ignore[assignment]
    for raw_name, param in model.named_parameters():
        name, shape = plain_name(raw_name), tuple(param.shape)
        spec = init_spec(name, of_model)
        place(param, lambda rows, n=name, s=shape, i=spec: init_tensor(n, s, i, seed, rows))  # type: ignore[misc]


def load_weights(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Copy full tensors under our names into a model's parameters (DTensors included).

    Raises CheckpointError for a name or shape that does not fit, and for a parameter left out.
    """
    params = {plain_name(name): param for name, param in model.named_parameters()}
    missing = set(params)
    for name, tensor in named:
        if name not in params:
            raise CheckpointError(f"tensor {name!r} has no parameter in this model")
        if tensor.shape != params[name].shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, but the model's parameter has "
                f"{tuple(params[name].shape)}; does the config belong to these weights?"
            )
        place(params[name], lambda rows, t=tensor: t[rows])  # type: ignore[misc]
        missing.discard(name)
    if missing:
        raise CheckpointError(f"no tensor for the parameters {', '.join(sorted(missing)[:5])}")
