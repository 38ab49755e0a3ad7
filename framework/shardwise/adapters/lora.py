"""LoRA and DoRA as modules that take part in the product of the layer that they adapt.

A rank holds of A and B what it holds of the weight, so that a block gets no further collective:

- outputs cut (column-parallel): A is whole, B is cut by its rows, as the weight is. What the ranks
  give A's gradient are parts of a sum; they are added behind the backward pass with those of norms
  (`parallel.tensor.sum_partial`).
- inputs cut (row-parallel): A is cut by its columns, as the weight is, and B is whole. A rank's
  ``B A x`` is a part of the sum, as its ``W x`` is, and leaves with it. B's gradient is partial.
- DoRA divides by norms of whole rows. Where inputs are cut, the ranks' squares are summed first, a
  number an output: the one collective that an adapter adds. (They change with every update, and
  ZeRO-3 has the weights whole in the forward pass alone.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from shardwise.adapters.config import LowRankConfig
from shardwise.adapters.targets import MARK, Target, stand_still
from shardwise.models.common.decoder import Decoder
from shardwise.ops import rng
from shardwise.ops.dropout import dropout
from shardwise.parallel import regions, tensor

# Shape suffixes: B sequences, T tokens, I input and O output features, R rank of the update, V
# tokens of a vocabulary. A and B without one are the two factors, by their names.


@dataclasses.dataclass
class Keys:
    """The rng keys (int64, a token) of the micro-batch that the layers around compute, or of those
    tokens alone that a head computes (N); None: no dropout."""

    value_BT: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Cut:
    """How A and B lie on tp ranks, and whose gradients are partial sums there."""

    A: Placement
    B: Placement
    partial: tuple[str, ...]


_WHOLE = Replicate()
# By the dimension along which the weight is cut (embeddings: tokens x features).
LINEAR_CUTS = {
    0: Cut(_WHOLE, Shard(0), ("A",)),
    1: Cut(Shard(1), _WHOLE, ("B", "magnitude")),
    None: Cut(_WHOLE, _WHOLE, ("A", "B", "magnitude")),  # a whole weight, used in part
}
EMBEDDING_CUTS = {
    0: Cut(Shard(1), _WHOLE, ("B",)),
    None: Cut(_WHOLE, _WHOLE, ("A", "B")),  # if tokens are cut
}


def cut_of(host: tensor.Swapped, target: Target) -> tuple[int | None, Cut | None]:
    """The dimension along which a weight is cut, and what follows; no cut for a plain tensor."""
    weight = host.weight
    if not isinstance(weight, DTensor):
        return None, None
    [placement] = weight.placements
    dim = placement.dim if isinstance(placement, Shard) else None
    cut = (EMBEDDING_CUTS if target.embeds else LINEAR_CUTS)[dim]
    if target.embeds and dim is None and "weight" not in host.partial:
        cut = dataclasses.replace(cut, partial=())
    return dim, cut


class LowRank(nn.Module):
    """``W x`` made ``(W + s B A) x``, with magnitudes m ``m / |W + s B A| (W + s B A) x``.

    ``A0``, ``B0``: what counts as nothing (PiSSA): ``s (B A - B0 A0)`` stands for ``s B A``. So the
    weights themselves stay what they were, shared by whoever else computes with them.
    """

    A: nn.Parameter
    B: nn.Parameter

    def __init__(
        self, host: tensor.Swapped, target: Target, config: LowRankConfig, keys: Keys
    ) -> None:
        super().__init__()
        config = config.of(target.path)
        self.scaling, self.p, self.keys = config.scaling, config.dropout, keys
        self.salt = rng.key(0, MARK, target.path) & 0x7FFFFFFF
        rows, columns = target.rows, target.columns
        inputs, outputs = (rows, columns) if target.embeds else (columns, rows)
        dim, cut = cut_of(host, target)
        self.partial = () if cut is None else cut.partial
        shapes = {"A": (config.rank, inputs), "B": (outputs, config.rank)}
        self.parts: Any = None  # of inputs: which ranks' sum makes a row whole
        self.first_input = 0
        if dim == 1:
            axis: Any = host.axis
            self.parts = axis.group
            self.first_input = axis.rank * -(-inputs // axis.size)

        def parameter(name: str, shape: tuple[int, ...], trained: bool = True) -> None:
            weight: Any = host.weight  # perhaps a DTensor, and what it makes would be one
            old = nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
            old.requires_grad_(trained)
            if cut is not None:
                kind = name.rstrip("0")
                placement = cut.B if kind == "magnitude" else getattr(cut, kind)
                old = host.axis.parameter(old, placement)  # type: ignore[union-attr,operator]
            setattr(self, name, old)

        for name, shape in shapes.items():
            parameter(name, shape)
        self.subtracts = config.init == "pissa"
        if self.subtracts:
            for name, shape in shapes.items():
                parameter(f"{name}0", shape, trained=False)
        self.has_magnitudes = config.magnitudes
        if self.has_magnitudes:
            parameter("magnitude", (outputs,))

    def forward(self, x_BTI: Tensor, out_BTO: Tensor, weight_OI: Tensor, rows: slice) -> Tensor:
        """What ``W x``, without its bias, becomes; ``rows``: the outputs among this rank's."""
        A, B = tensor.local(self.A), tensor.local(self.B)[rows]
        noisy_BTI = dropout(x_BTI, self.p, self.keys.value_BT, self.salt, self.first_input)
        delta_BTO = F.linear(F.linear(noisy_BTI, A), B)
        less: tuple[Tensor, Tensor] | None = None
        if self.subtracts:
            less = tensor.local(self.A0), tensor.local(self.B0)[rows]  # type: ignore[arg-type]
            delta_BTO = delta_BTO - F.linear(F.linear(x_BTI, less[0]), less[1])
        out_BTO = out_BTO + (self.scaling * delta_BTO).to(out_BTO.dtype)
        if not self.has_magnitudes:
            return out_BTO
        with torch.no_grad():
            norm_O = self._norm(weight_OI, A, B, less)
        magnitude_O = tensor.local(self.magnitude)[rows]  # type: ignore[arg-type]
        return out_BTO * (magnitude_O.to(norm_O.dtype) / norm_O).to(out_BTO.dtype)

    def _norm(
        self, weight_OI: Tensor, A: Tensor, B: Tensor, less: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Norms of the adapted weight's whole rows, in fp32 at least."""
        dtype = torch.promote_types(weight_OI.dtype, torch.float32)
        adapted_OI = weight_OI.to(dtype) + self.scaling * (B.to(dtype) @ A.to(dtype))
        if less is not None:
            adapted_OI -= self.scaling * (less[1].to(dtype) @ less[0].to(dtype))
        square_O = adapted_OI.square().sum(1)
        return (square_O if self.parts is None else regions.leave(square_O, self.parts)).sqrt()


class LowRankRows(LowRank):
    """The same of an embedding's rows: ``E[id] + s B A[:, id]``."""

    def forward(self, ids_BT: Tensor, out_BTD: Tensor, table_VD: Tensor, rows: slice) -> Tensor:
        """What the rows of a table become; nothing is dropped."""
        chosen_BTR = F.embedding(ids_BT, tensor.local(self.A).T)
        return out_BTD + self.scaling * F.linear(chosen_BTR, tensor.local(self.B))


def attach(model: Decoder, targets: list[Target], config: LowRankConfig) -> list[str]:
    """Adapt modules of a part of a model (on the meta device), in place; all else stands still.

    Returns the names of the parameters whose gradients are partial sums over tp ranks.
    """
    stand_still(model)
    partial: list[str] = []
    inside, behind = Keys(), Keys()
    present = dict(model.named_modules())
    for target in (t for t in targets if t.path in present):
        swap = tensor.swapped_embedding if target.embeds else tensor.swapped_linear
        host = swap(model, target.path)
        kind = LowRankRows if target.embeds else LowRank
        keys = inside if target.path.startswith("layers.") else behind
        host.adapter = adapter = kind(host, target, config, keys)
        names = dict(adapter.named_parameters())
        partial += [f"{target.path}.{MARK}.{n}" for n in adapter.partial if n in names]
    if config.dropout:
        _tell_keys(model, inside, behind)
    return partial


def _tell_keys(model: Decoder, inside: Keys, behind: Keys) -> None:
    """Leave a micro-batch's rng keys where linear layers find them.

    Within a block at its own call, which is repeated where blocks are recomputed.
    """

    def told(block: nn.Module) -> Any:
        forward = block.forward

        def run(x_BTD: Tensor, context: Any) -> Tensor:
            inside.value_BT = context.rng_keys_BT
            return forward(x_BTD, context)  # type: ignore[no-any-return]

        return run

    for block in filter(None, model.layers):
        block.forward = told(block)

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        keys_BT, read_N = kwargs.get("rng_keys_BT"), kwargs.get("read_N")
        if keys_BT is not None and read_N is not None:
            keys_BT = keys_BT.flatten().index_select(0, read_N)
        behind.value_BT = keys_BT

    model.register_forward_pre_hook(before, with_kwargs=True)
