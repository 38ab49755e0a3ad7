"""FP8 by Transformer Engine: which of its modules compute for which of ours.

Our modules, their names and their DTensor parameters stay; only their ``forward`` is replaced, as
recompute and compile do. What the library computes, its collectives included, is one of

- LayerNormLinear for a norm and all linear layers behind it (q, k and v; gate and up): the norm
  returns all their outputs side by side, and each layer takes its own. Several layers are fused
  only where scales belong to tiles, and tiles to one layer: one scale for a tensor would become
  one for all of them;
- Linear, row parallel, for what closes a parallel region;
- Linear on local parts for the rest, behind a norm of ours that has entered the region.

A layer that the sentinel watches, that fell back or that has no scales yet (delayed scaling, first
step) computes as without the library.

With sequence parallelism the library's collectives cut the first dimension, so its rows are ordered
by token, then by sequence: tiles along the rows (for weight gradients, by tiles) then hold other
tokens than the emulation's, unless a micro-batch has one sequence.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from shardwise.models.common.blocks import RMSNorm
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.sharding import ShardRule
from shardwise.ops import fp8
from shardwise.ops import transformer_engine as library
from shardwise.ops.fp8_linear import Site
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.norms import Entering
from shardwise.parallel.tensor import (
    EnteringNorm,
    RowLinear,
    SharedHeadLinear,
    Swapped,
    expect,
    local,
)

# Shape suffixes: B sequences, T tokens (t of them on this rank), I input and O output features.


class TransformerEngine:
    """The library's part in one model on this rank."""

    def __init__(self, recipe: fp8.Recipe, mesh: Mesh, dtype: torch.dtype) -> None:
        self.recipe = library.library_recipe(recipe)
        self.delayed = recipe.scaling == "delayed"
        self.tile = None if recipe.block("x") is None else fp8.WIDTHS[recipe.scaling]
        self.dtype, self.layout = dtype, mesh.layout
        self.tp, self.amax_group = mesh.groups["tp"], mesh.groups["stage"]
        self.modules: dict[str, nn.Module] = {}  # by path of our layer; shared by fused ones

    def attach(self, model: Decoder, table: Iterable[ShardRule], sites: Mapping[str, Site]) -> None:
        """Replace forwards in a part of a model whose quantised layers are `Swapped`, in place."""
        fused: set[str] = set()
        alone = model.spec.layer.norms != "shared"  # else the feed-forward reads it, too
        for norm, columns in norms_and_columns(model, table):
            known = alone and _known_norm(model.get_submodule(norm))
            if known and all(c in sites for c in columns) and self._fusible(model, columns):
                self._fuse(model, norm, columns, sites)
                fused.update(columns)
        for path, module in list(model.named_modules()):
            if path in sites and path not in fused:
                assert isinstance(module, Swapped)
                self._linear(path, module, sites[path])

    def _fusible(self, model: Decoder, columns: list[str]) -> bool:
        """Whether the layers' scales are the same numbers side by side as one by one."""
        if self.tile is None or len(columns) == 1:
            return len(columns) == 1
        widths = [_held(model.get_submodule(c))[0].shape[0] for c in columns]
        return all(width % self.tile == 0 for width in widths)

    def _parallel(self, mode: str | None) -> library.Parallel:
        if self.layout.tp == 1 or mode is None:
            return library.Parallel()
        return library.Parallel(mode, self.tp, self.layout.tp, self.layout.sp)

    def _fuse(
        self, model: Decoder, norm_path: str, paths: list[str], sites: Mapping[str, Site]
    ) -> None:
        norm = model.get_submodule(norm_path)
        if not isinstance(norm, EnteringNorm):
            expect(norm, norm_path, RMSNorm, nn.LayerNorm)
        columns = [model.get_submodule(p) for p in paths]
        held = [_held(c) for c in columns]
        widths = [weight_OI.shape[0] for weight_OI, _ in held]
        module = library.norm_linear(
            " ".join(paths),
            held[0][0].shape[1],
            sum(widths) * self.layout.tp,
            eps=norm.eps,  # type: ignore[arg-type]
            centred=type(norm) is nn.LayerNorm or getattr(norm, "centred", False),
            bias=held[0][1] is not None,
            dtype=self.dtype,
            parallel=self._parallel("column"),
        )

        def tensors() -> dict[str, Tensor | None]:
            weights, biases = zip(*(_held(c) for c in columns))
            bias = getattr(norm, "bias", None)
            return {
                "layer_norm_weight": local(norm.weight),  # type: ignore[arg-type]
                "layer_norm_bias": None if bias is None else local(bias),
                "weight": _side_by_side(weights),
                "bias": None if biases[0] is None else _side_by_side(biases),
            }

        mine = [sites[p] for p in paths]
        self._replace(norm, mine, lambda x: self._call(module, tensors(), x))
        for path, column, start, width in zip(paths, columns, _starts(widths), widths):
            self.modules[path] = module
            self._replace(column, mine, _cut(start, width))

    def _linear(self, path: str, layer: Swapped, site: Site) -> None:
        row = isinstance(layer, RowLinear)
        parallel = self._parallel("row" if row else None)
        weight_OI, bias_O = _held(layer)
        module = library.linear(
            path,
            weight_OI.shape[1] * parallel.size,
            weight_OI.shape[0],
            bias=bias_O is not None,
            dtype=self.dtype,
            parallel=parallel,
        )

        def forward(x_BTI: Tensor) -> Tensor:
            tensors = dict(zip(("weight", "bias"), _held(layer)))
            return self._call(module, tensors, x_BTI, parallel.sequence)

        self.modules[path] = module
        self._replace(layer, [site], forward)

    def _call(
        self,
        module: nn.Module,
        tensors: Mapping[str, Tensor | None],
        x_BTI: Tensor,
        tokens_first: bool | None = None,
    ) -> Tensor:
        if not (self.layout.sp if tokens_first is None else tokens_first):
            return library.call(module, tensors, x_BTI)
        # Its collectives cut and join the first dimension.
        out_TBO = library.call(module, tensors, x_BTI.transpose(0, 1).contiguous())
        return out_TBO.transpose(0, 1)

    def _replace(
        self, module: nn.Module, sites: list[Site], forward: Callable[[Tensor], Tensor]
    ) -> None:
        ours = module.forward

        def choose(x: Tensor) -> Tensor:
            return forward(x) if all(map(self._computes, sites)) else ours(x)

        module.forward = choose  # type: ignore[method-assign]

    def _computes(self, site: Site) -> bool:
        known = not self.delayed or all(site.calibrated)
        return known and site.active and not site.watched

    # --- around passes --------------------------------------------------------------------------

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Around all forward and backward passes of a training step."""
        return library.step(self.recipe, self.amax_group)

    def evaluation(self) -> contextlib.AbstractContextManager[None]:
        """Around passes without gradient."""
        return library.computing(self.recipe, self.amax_group)

    # --- the memory of delayed scaling ----------------------------------------------------------

    def read(self, rows: Iterable[tuple[str, Tensor, Tensor]]) -> None:
        """Fill (path of a layer, amax history H3, scale 3) from the library."""
        for path, history_H3, scale_3 in rows:
            library.read_memory(self.modules[path], history_H3, scale_3)

    def write(self, rows: Iterable[tuple[str, Tensor, Tensor]]) -> None:
        """Give it back, before it has computed or after."""
        for path, history_H3, scale_3 in rows:
            module = self.modules[path]
            library.write_memory(module, history_H3, scale_3, self.recipe, self.amax_group)


def _known_norm(norm: nn.Module) -> bool:
    """Whether the library can compute it, in one with the layers behind it."""
    return not isinstance(norm, Entering | nn.Identity) and not getattr(norm, "plus_one", False)


def norms_and_columns(
    model: nn.Module, table: Iterable[ShardRule]
) -> Iterator[tuple[str, list[str]]]:
    """Each norm that enters a parallel region, and the linear layers that open it, by path.

    A model registers its modules in the order in which they compute.
    """
    rules = tuple(table)
    norm, columns = "", list[str]()
    for path, _ in model.named_modules():
        style = next((r.style for r in rules if fnmatch.fnmatchcase(path, r.modules)), None)
        if style in ("column", "kv"):
            columns.append(path)
        elif style in ("sequence", "row"):
            if norm and columns:
                yield norm, columns
            norm, columns = (path if style == "sequence" else ""), []
    if norm and columns:
        yield norm, columns


def _held(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight (OI) and bias that this rank multiplies with."""
    assert isinstance(layer, Swapped)
    weight, bias = local(layer.weight), layer.bias  # type: ignore[arg-type]
    bias = None if bias is None else local(bias)  # type: ignore[arg-type]
    if isinstance(layer, SharedHeadLinear):
        weight = weight[layer.rows]
        bias = None if bias is None else bias[layer.rows]
    return weight, bias


def _side_by_side(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _starts(widths: list[int]) -> list[int]:
    return [sum(widths[:i]) for i in range(len(widths))]


def _cut(start: int, width: int) -> Callable[[Tensor], Tensor]:
    return lambda y_BTO: y_BTO.narrow(-1, start, width)
