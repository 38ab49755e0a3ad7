"""Tensor and sequence parallelism by swapping modules, one table row at a time (decision 1).

Swapped modules keep their parameters as DTensors on the tp mesh and compute on local tensors.
Activations enter the parallel region behind a norm and leave it behind a row-parallel linear, so
each block costs two collectives forward and two backward, with sequence parallelism or without.

Gradients of weights that every rank holds whole but feeds with its own part (norms on cut
sequences, norms inside heads, key/value projections of shared heads) are partial sums. They are
summed after the backward pass, all in one fp32 buffer and in a fixed order (`sum_partial`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from shardwise.errors import ConfigError
from shardwise.models.common.blocks import (
    Attention,
    Dropout,
    ExactGeluMLP,
    GeGLU,
    GeluMLP,
    LayerNormPlusOne,
    ReluSquaredMLP,
    RMSNorm,
    Sinks,
    SwiGLU,
    is_exactly,
)
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.sharding import ShardRule
from shardwise.ops import comm
from shardwise.ops.linear import wide_linear
from shardwise.parallel import regions
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.norms import Entering, HeadNumbers, HeadsNorm
from shardwise.parallel.norms import EnteringNorm as EnteringNorm
from shardwise.parallel.swapped import Axis as Axis
from shardwise.parallel.swapped import Matmul as Matmul
from shardwise.parallel.swapped import Swapped as Swapped
from shardwise.parallel.swapped import local as local

# Shape suffixes: B sequences, T tokens, D model width, I input and O output features.


class UnshardedLinear(Swapped):
    """A linear layer that no rank cuts, swapped for what may be done to its products."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = old.weight, old.bias

    def forward(self, x: Tensor) -> Tensor:
        """See `nn.Linear`."""
        return self.product(x, self.weight, self.bias)


class UnshardedEmbedding(Swapped):
    """An embedding that no rank cuts, swapped for what may be added to it."""

    def __init__(self, old: nn.Embedding) -> None:
        super().__init__()
        self.weight = old.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        """See `nn.Embedding`."""
        return self.look_up(ids_BT, self.weight)


def defer_weight_products(model: Decoder) -> None:
    """Make every linear layer able to leave its weight product for later, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Swapped):
            swapped_linear(model, path).defer = True


def swapped_linear(model: Decoder, path: str) -> Swapped:
    """The module at ``path``; a plain linear layer is swapped first."""
    return _swapped(model, path, nn.Linear, UnshardedLinear)


def swapped_embedding(model: Decoder, path: str) -> Swapped:
    """The same of an embedding."""
    return _swapped(model, path, nn.Embedding, UnshardedEmbedding)


def _swapped(
    model: Decoder, path: str, kind: type[nn.Module], swap: Callable[[Any], Swapped]
) -> Swapped:
    module = model.get_submodule(path)
    if not isinstance(module, Swapped):
        expect(module, path, kind)
        module = swap(module)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
        model.retie()
    return module


def expect(module: nn.Module, path: str, *kinds: type[nn.Module]) -> None:
    """Raise ConfigError unless ``module``, about to be swapped, is exactly one of ``kinds``."""
    if not is_exactly(module, *kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(
            f"{path} is a {type(module).__qualname__}, and what takes its place here computes what "
            f"{names} does and nothing else; choose a layout and a precision that leave it whole"
        )


def widen_logits(model: Decoder) -> None:
    """Make the head, of 16-bit weights, give fp32 logits, in place; nothing if it is not here.

    A sampler and a trainer that round logits to bf16 each in its way disagree on probabilities,
    which reinforcement learning takes for off-policy samples (MiniMax 2025, "MiniMax-M1",
    section 3.2, where an fp32 head mended it).
    """
    head = model.head
    if isinstance(head, Swapped):
        head.matmul = wide_linear
    elif is_exactly(head, nn.Linear) and head.bias is None:
        head.forward = lambda input: wide_linear(input, head.weight)  # type: ignore[method-assign]


class ColumnLinear(Swapped):
    """Output features are cut: each rank computes its own."""

    def __init__(self, old: nn.Linear, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.weight = axis.parameter(old.weight, Shard(0))
        self.bias = None if old.bias is None else axis.parameter(old.bias, Shard(0))

    def forward(self, x_BTI: Tensor) -> Tensor:
        """All inputs to this rank's outputs."""
        return self.product(x_BTI, self.weight, self.bias, self.axis.later)


class ScalarLinear(Swapped):
    """One output cannot be cut: input features are, and each rank's result is a part of the sum.

    `ops.logits.selected_values` adds the parts. (Leaving whole rows to one rank would leave its
    peers with empty shards, which FSDP2 cannot reduce.)
    """

    def __init__(self, old: nn.Linear, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.weight = axis.parameter(old.weight, Shard(1))

    def forward(self, x_BTI: Tensor) -> Tensor:
        """This rank's features of whole inputs."""
        width = -(-x_BTI.shape[-1] // self.axis.size)
        own = x_BTI.narrow(-1, self.axis.rank * width, local(self.weight).shape[1])
        return self.product(own, self.weight, None)


class SharedHeadLinear(Swapped):
    """A key or value projection with fewer heads than ranks: whole, of which one head is used."""

    partial = ("weight", "bias")

    def __init__(self, old: nn.Linear, axis: Axis, num_heads: int) -> None:
        super().__init__()
        width = old.out_features // num_heads
        start = axis.rank * num_heads // axis.size * width
        self.axis, self.rows = axis, slice(start, start + width)
        self.weight = axis.parameter(old.weight, Replicate())
        self.bias = None if old.bias is None else axis.parameter(old.bias, Replicate())

    def forward(self, x_BTI: Tensor) -> Tensor:
        """All inputs to the outputs of this rank's head."""
        weight = local(self.weight)[self.rows]
        bias = None if self.bias is None else local(self.bias)[self.rows]
        return self.multiply(x_BTI, weight, bias)


class RowLinear(Swapped):
    """Input features are cut: the ranks' results are summed on the way out."""

    def __init__(self, old: nn.Linear, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.weight = axis.parameter(old.weight, Shard(1))
        self.bias = None if old.bias is None else axis.parameter(old.bias, Replicate())
        self.partial = ("bias",) if axis.sequence else ()

    def forward(self, x_BTI: Tensor) -> Tensor:
        """This rank's inputs to all outputs."""
        out = self.axis.leave(self.product(x_BTI, self.weight, None))
        return out if self.bias is None else out + local(self.bias)


class VocabEmbedding(Swapped):
    """Rows of the vocabulary are cut: a token that another rank holds counts as zero here."""

    def __init__(self, old: nn.Embedding, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.weight = axis.parameter(old.weight, Shard(0))
        self.start = axis.rank * -(-old.num_embeddings // axis.size)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embeddings of all tokens, or of this rank's under sequence parallelism."""
        table = local(self.weight)
        if table.shape[0] == 0:  # a vocabulary smaller than its ranks
            nothing = table.new_zeros((*ids_BT.shape, table.shape[1])) + 0.0 * table.sum()
            return self.axis.leave(nothing)
        here_BT = (ids_BT >= self.start) & (ids_BT < self.start + table.shape[0])
        rows_BTD = self.look_up(torch.where(here_BT, ids_BT - self.start, 0), table)
        return self.axis.leave(torch.where(here_BT[..., None], rows_BTD, 0.0))


class TokenEmbedding(Swapped):
    """An embedding that is whole on every rank, looked up for this rank's tokens."""

    def __init__(self, old: nn.Embedding, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.weight = axis.parameter(old.weight, Replicate())
        self.partial = ("weight",) if axis.sequence else ()

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embeddings of this rank's tokens."""
        return self.look_up(self.axis.own_tokens(ids_BT), local(self.weight))


class TokenDropout(nn.Module):
    """Dropout on this rank's tokens, with their own rng keys."""

    def __init__(self, old: Dropout, axis: Axis) -> None:
        super().__init__()
        self.old, self.axis = old, axis

    def forward(self, x_BTD: Tensor, rng_keys_BT: Tensor | None, salt: int) -> Tensor:
        """See `models.common.blocks.Dropout`."""
        own = None if rng_keys_BT is None else self.axis.own_tokens(rng_keys_BT)
        return self.old(x_BTD, own, salt)  # type: ignore[no-any-return]


_REGIONS = (Attention, SwiGLU, GeGLU, GeluMLP, ExactGeluMLP, ReluSquaredMLP)
_NORMS = (RMSNorm, nn.LayerNorm, LayerNormPlusOne)
# What each style takes the place of.
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "vocab": (nn.Embedding,),
    "kv": (nn.Linear,),
    "column": (nn.Linear,),
    "row": (nn.Linear,),
    "sequence": (*_NORMS, nn.Identity),
    "own_tokens": _NORMS,
    "per_head": _NORMS,
    "heads": (RMSNorm, Sinks),
    "kv_heads": (RMSNorm,),
    "tokens": (Dropout, nn.Embedding),
}


def _swap(old: nn.Module, style: str, axis: Axis, kv_heads: int) -> nn.Module:
    """The table of styles."""
    if style == "vocab":
        assert isinstance(old, nn.Embedding)
        return VocabEmbedding(old, axis)
    if style == "kv":
        assert isinstance(old, nn.Linear)
        shared = kv_heads < axis.size
        return SharedHeadLinear(old, axis, kv_heads) if shared else ColumnLinear(old, axis)
    if style in ("column", "row"):
        assert isinstance(old, nn.Linear)
        if style == "row":
            return RowLinear(old, axis)
        return ScalarLinear(old, axis) if old.out_features == 1 else ColumnLinear(old, axis)
    if type(old) is nn.Identity:
        return Entering(axis)
    if style in ("sequence", "own_tokens", "per_head"):
        enters, parts = style == "sequence", style == "per_head" or axis.sequence
        return EnteringNorm(old, axis, enters=enters, partial=parts)
    if isinstance(old, Sinks):
        return HeadNumbers(old, axis)
    if style in ("heads", "kv_heads"):
        assert isinstance(old, RMSNorm)
        copies = axis.size // kv_heads if style == "kv_heads" else 1
        return HeadsNorm(old, axis, max(1, copies))
    if style == "tokens":
        if isinstance(old, Dropout):
            return TokenDropout(old, axis)
        assert isinstance(old, nn.Embedding)
        return TokenEmbedding(old, axis)
    raise ValueError(f"unknown tensor-parallel style {style!r}")


def parallelize(
    model: Decoder, table: Iterable[ShardRule], mesh: Mesh, *, overlap: bool = False
) -> list[str]:
    """Swap the modules of ``model`` (on the meta device) in place, by its family's table.

    ``overlap`` computes weight products while the gradient of their input travels; not for models
    to compile. Returns the names of the parameters whose gradients are partial sums over tp ranks.
    Raises ValueError for a module with parameters that no row of the table names, ConfigError for
    one that is a subclass of what a row replaces.
    """
    if mesh.layout.tp == 1:
        return []
    group = mesh.groups["tp"]
    axis = Axis(mesh, regions.register(group), group.size(), group.rank(), mesh.layout.sp, overlap)
    rules = tuple(table)
    partial: list[str] = []
    for path, module in list(model.named_modules()):
        rule = next((r for r in rules if fnmatch.fnmatchcase(path, r.modules)), None)
        if rule is None:
            if any(True for _ in module.parameters(recurse=False)):
                raise ValueError(f"{path}: no row of the tensor-parallel table names this module")
            continue
        expect(module, path, *_KINDS[rule.style])
        parent, _, name = path.rpartition(".")
        around = model.get_submodule(parent)
        if isinstance(around, _REGIONS):  # which now sees parts of its features
            expect(around, parent, *_REGIONS)
        new = _swap(module, rule.style, axis, model.config.kv_heads)
        setattr(model.get_submodule(parent), name, new)
        owned = dict(new.named_parameters(recurse=False))
        partial += [f"{path}.{n}" for n in getattr(new, "partial", ()) if n in owned]
    model.retie()
    for module in model.modules():  # their head counts follow from their projections
        if type(module) is Attention:
            module.head_offset = axis.rank * model.config.num_heads // axis.size
    return partial


@torch.no_grad()
def sum_partial(grads: Sequence[Tensor], mesh: Mesh) -> None:
    """Sum local gradients over the tp ranks in place: one buffer, one collective."""
    if not grads:
        return
    flat = torch.cat([g.reshape(-1) for g in grads])
    comm.all_reduce(flat, mesh.groups["tp"], regions.AXIS)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))
