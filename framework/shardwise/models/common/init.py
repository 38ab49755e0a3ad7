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
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shardwise.errors import CheckpointError
from shardwise.ops import rng

_BLOCK_ELEMENTS = 1 << 18
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
_RESIDUAL_OUTPUTS = (".attn.o.weight", ".mlp.down.weight")
STD = 0.02


@dataclasses.dataclass(frozen=True)
class InitSpec:
    """How a parameter starts."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = STD


def init_spec(name: str, num_layers: int) -> InitSpec:
    """The scheme above, by parameter name."""
    if name.endswith("bias"):
        return InitSpec("zeros")
    if name.endswith("norm.weight"):
        return InitSpec("ones")
    if name.endswith(_RESIDUAL_OUTPUTS):
        return InitSpec("normal", STD / math.sqrt(2 * num_layers))
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
    block = max(1, _BLOCK_ELEMENTS // max(1, math.prod(rest)))
    generator = torch.Generator("cpu")
    for index in range(start // block, -(-stop // block) if stop > start else 0):
        generator.manual_seed(rng.key(seed, "init", name, *shape, index))
        # Always a full block: how many numbers are asked for changes which numbers come.
        values = torch.randn((block, *rest), generator=generator, device="cpu")
        first, last = index * block, (index + 1) * block
        low, high = max(first, start), min(last, stop)
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
    CPU; only what this rank holds is asked for where its part is a slice. No communication.
    """
    if not isinstance(param, DTensor):
        param.copy_(rows_of(slice(0, param.shape[0])))
        return
    local = param.to_local()
    if not all(type(p) is Shard or p.is_replicate() for p in param.placements):
        # Strided shards (data over tensor parallel) are not one slice of rows.
        full = rows_of(slice(0, param.shape[0])).to(local.device, param.dtype)
        mesh, placements = param.device_mesh, param.placements
        local.copy_(distribute_tensor(full, mesh, placements, src_data_rank=None).to_local())
        return
    size, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    if local.numel() == 0:
        return
    value = rows_of(slice(offset[0], offset[0] + size[0]))
    for dim in range(1, param.dim()):
        value = value.narrow(dim, offset[dim], size[dim])
    local.copy_(value)


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter of a model with ``model.config.num_layers``, materialised already."""
    num_layers: int = model.config.num_layers  # type: ignore[union-attr,assignment]
    for raw_name, param in model.named_parameters():
        name, shape = plain_name(raw_name), tuple(param.shape)
        spec = init_spec(name, num_layers)
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
