"""Where each parameter of ours lies in those of Megatron, on this rank.

Megatron fuses: queries, keys and values in one weight (for each key/value head its queries, then
the key, then the value), gate and up in another, and with Transformer Engine a norm into the linear
layer behind it. A `Place` is a view of the fused parameter with this tensor-parallel rank's part of
ours in it, so that reading and writing are one table. Foreign names do not leave this file.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from shardwise.errors import ShardwiseError
from shardwise.models.common.config import DecoderConfig
from shardwise.ops.local_shards import local_shards
from shardwise.parallel.full_tensor import chunk_size, join, local_tensor, tp_dim
from shardwise.parallel.mesh import Mesh

# Shape suffixes: G key/value heads of this rank, M heads of one group (queries, key, value), K head
# width.

View = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Place:
    """A view of a parameter of Megatron's, or of a tensor as large, such as its gradient."""

    parameter: nn.Parameter
    view: View

    def read(self, fused: Tensor, shape: torch.Size) -> Tensor:
        """This rank's part of ours, ``shape``, out of the fused tensor."""
        return self.view(fused).reshape(shape)

    def write(self, fused: Tensor, value: Tensor) -> None:
        """The other way round."""
        view = self.view(fused)
        view.copy_(value.view(view.shape))


def places(part: nn.Module, model: DecoderConfig, layers: range, mesh: Mesh) -> dict[str, Place]:
    """By our names, all parameters of a pipeline stage with these layers.

    Raises ShardwiseError for one of Megatron's that no row names: a release that we do not know.
    """
    held: dict[str, nn.Parameter] = dict(part.named_parameters())
    left, found = set(held), {}
    for ours, theirs, view in _rows(model, layers, mesh):
        name = next((n for n in theirs if n in held), None)
        if name is not None:
            found[ours] = Place(held[name], view)
            left.discard(name)
    if left:
        raise ShardwiseError(
            f"engine.kind: megatron: nothing of ours is in {', '.join(sorted(left)[:3])} of this "
            "megatron-core; write kind: native, and report it"
        )
    return found


def _rows(
    model: DecoderConfig, layers: range, mesh: Mesh
) -> Iterator[tuple[str, tuple[str, ...], View]]:
    """Our name, where it may be, and as which part of it."""
    words = _first(_vocabulary(model.vocab_size, mesh))
    last = "output_layer.weight"
    yield (
        "embed.weight",
        ("embedding.word_embeddings.weight", *(last,) * model.tie_embeddings),
        words,
    )
    yield "pos_embed.weight", ("embedding.position_embeddings.weight",), _all
    for number, layer in enumerate(layers):
        there, ours = f"decoder.layers.{number}.", f"layers.{layer}."
        for name, options, view in _layer_rows(model, mesh):
            yield ours + name, tuple(there + option for option in options), view
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", (f"decoder.final_layernorm.{kind}",), _all
    if not model.tie_embeddings:
        yield "head.weight", (last,), _all if model.head == "scalar" else words


def _layer_rows(model: DecoderConfig, mesh: Mesh) -> Iterator[tuple[str, tuple[str, ...], View]]:
    attn, mlp = "self_attention.", "mlp."
    heads = _Heads(model, mesh.layout.tp)
    layer = model.spec.layer
    wide, gated = layer.ffn_size // mesh.layout.tp, layer.gated
    for kind in ("weight", "bias"):
        fused = (f"{attn}linear_qkv.{kind}",)
        yield f"attn.q.{kind}", fused, heads.queries
        yield f"attn.k.{kind}", fused, heads.keys
        yield f"attn.v.{kind}", fused, heads.values
        yield f"attn.o.{kind}", (f"{attn}linear_proj.{kind}",), _all
        if gated:
            yield f"mlp.gate.{kind}", (f"{mlp}linear_fc1.{kind}",), _first(wide)
            yield f"mlp.up.{kind}", (f"{mlp}linear_fc1.{kind}",), _behind(wide)
        else:
            yield f"mlp.up.{kind}", (f"{mlp}linear_fc1.{kind}",), _all
        yield f"mlp.down.{kind}", (f"{mlp}linear_fc2.{kind}",), _all
        yield (
            f"attn_norm.{kind}",
            (f"input_layernorm.{kind}", f"{attn}linear_qkv.layer_norm_{kind}"),
            _all,
        )
        yield (
            f"mlp_norm.{kind}",
            (f"pre_mlp_layernorm.{kind}", f"{mlp}linear_fc1.layer_norm_{kind}"),
            _all,
        )
    yield "attn.q_norm.weight", (f"{attn}q_layernorm.weight",), _all
    yield "attn.k_norm.weight", (f"{attn}k_layernorm.weight",), _all


# --- views ----------------------------------------------------------------------------------------


def _all(fused: Tensor) -> Tensor:
    return fused


def _first(size: int) -> View:
    return lambda fused: fused[:size]


def _behind(size: int) -> View:
    return lambda fused: fused[size:]


def _vocabulary(size: int, mesh: Mesh) -> int:
    """Rows of this rank that are words; behind them Megatron's table is filled up."""
    return chunk_size(size, mesh.layout.tp, mesh.place["tp"])


class _Heads:
    """Views of a fused projection."""

    def __init__(self, model: DecoderConfig, tp: int) -> None:
        self.groups, self.width = model.kv_heads // tp, model.head_width
        self.shared = model.num_heads // model.kv_heads

    def _grouped(self, fused: Tensor) -> Tensor:
        """GMK, and what features go in."""
        return fused.view(self.groups, self.shared + 2, self.width, *fused.shape[1:])

    def queries(self, fused: Tensor) -> Tensor:
        """Of each group the first."""
        return self._grouped(fused)[:, : self.shared]

    def keys(self, fused: Tensor) -> Tensor:
        """Of each group the last but one."""
        return self._grouped(fused)[:, self.shared]

    def values(self, fused: Tensor) -> Tensor:
        """Of each group the last."""
        return self._grouped(fused)[:, self.shared + 1]


def runs(place: Place) -> Iterator[tuple[int, int, int]]:
    """How ours lies in the fused parameter, both flattened: (first of ours, of it, length).

    In rising order of both: what is fused is stacked along the first dimension.
    """
    # Of a tensor without memory: strides are all that is asked.
    view = place.view(torch.empty(place.parameter.shape, device="meta"))
    block, outer = 1, list(zip(view.shape, view.stride(), strict=True))
    while outer and (outer[-1][0] == 1 or outer[-1][1] == block):
        block *= outer.pop()[0]
    for i, index in enumerate(itertools.product(*(range(size) for size, _ in outer))):
        at = sum(n * stride for n, (_, stride) in zip(index, outer, strict=True))
        yield i * block, int(view.storage_offset()) + at, block


def cut_dim(place: Place, shape: torch.Size, mesh: Mesh) -> int | None:
    """Along which dimension tensor ranks cut a tensor of ours of this global shape; None: not."""
    view = place.view(torch.empty(place.parameter.shape, device="meta"))
    if mesh.layout.tp == 1 or view.numel() == shape.numel():
        return None
    return 0 if len(shape) == 1 or view.shape[-1] == shape[-1] else 1


def mark(where: Mapping[str, Place], shapes: Mapping[str, torch.Size], mesh: Mesh) -> None:
    """Say to Megatron which parameters tensor ranks cut.

    It does so itself where it draws initial weights. Without the mark its norm takes each for a
    copy of the first tensor rank's: silently, the others' parts do not count.
    """
    for name, place in where.items():
        cut = cut_dim(place, shapes[name], mesh) is not None
        place.parameter.tensor_model_parallel = cut  # type: ignore[attr-defined]


# --- our masters ----------------------------------------------------------------------------------


def part_shape(master: Tensor, mesh: Mesh) -> torch.Size:
    """Of this tensor-parallel rank's part, which ZeRO may cut further."""
    shape, cut = list(master.shape), tp_dim(master, mesh)
    if cut is not None:
        shape[cut] = chunk_size(shape[cut], mesh.layout.tp, mesh.place["tp"])
    return torch.Size(shape)


def load(where: Mapping[str, Place], masters: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Make Megatron's weights what the masters are; a collective call of those that share them."""
    for name, place in where.items():
        master = masters[name]
        rows = part_shape(master, mesh)[0]
        place.write(place.parameter.data, join(local_tensor(master), rows, 0, mesh.groups["shard"]))


def take(place: Place, fused: Tensor, master: Tensor, mesh: Mesh) -> Tensor:
    """A tensor like the master, cut as it is, with what the fused tensor holds of it."""
    value = place.read(fused, part_shape(master, mesh))
    found = torch.empty_like(master, dtype=fused.dtype)
    origin, cut = [0] * value.dim(), tp_dim(master, mesh)
    if cut is not None:
        origin[cut] = -(-master.shape[cut] // mesh.layout.tp) * mesh.place["tp"]
    for region, view in local_shards("a gradient", found):
        view.copy_(value[region.relative_to(tuple(origin))])
    return found
