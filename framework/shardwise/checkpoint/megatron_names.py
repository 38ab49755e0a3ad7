"""A checkpoint of Megatron-core's GPT model under our names.

Queries, keys and values are one tensor (for each key/value head its queries, the key, the value),
gate and up another, and layers are stacked, unless they were saved each by itself. A norm goes by
the linear layer behind it, or by its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from shardwise.checkpoint.optimizer_state import OptimizerState
from shardwise.checkpoint.torch_dist import MASTERS, Checkpoint
from shardwise.checkpoint.torch_dist_write import Part
from shardwise.errors import UserError
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.spec import beyond

# Of a spec, what Megatron's parts compute; windows and rotation are of its arguments.
_OF_MODEL = {"tied", "learned_positions", "embed_dropout"}
_OF_LAYER = {"window", "rope", "qkv_bias", "o_bias", "qk_norm", "attn_dropout", "dropout"}
_OF_LAYER |= {"gated", "activation", "mlp_bias"}

View = Callable[[Tensor], Tensor]  # our part of theirs
LAYERS = "decoder.layers."
_WORDS = "embedding.word_embeddings.weight"


def beyond_megatron(config: DecoderConfig) -> str | None:
    """The first switch of a model that Megatron's would leave out; None: there is none."""
    spec = config.spec
    field = beyond(spec, _OF_MODEL) or beyond(spec.norm, {"kind", "eps"})
    field = field or next((f for x in spec.layers if (f := beyond(x, _OF_LAYER))), None)
    if field is None and spec.layer.activation not in ("silu", "gelu_tanh"):
        return f"activation {spec.layer.activation}"
    if field is None and spec.layer.qk_norm == "projection":
        return "qk_norm over all heads"
    return field


def _refuse(config: DecoderConfig) -> None:
    """Raise UserError for a model whose tensors would fit, and compute something else."""
    if (field := beyond_megatron(config)) is not None:
        raise UserError(
            f"model.family: {config.family} computes {field}, and Megatron's model does not"
        )


def weights(found: Checkpoint, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Masters where there are some. Raises UserError for those of another model."""
    _refuse(config)
    masters = next((found.states[kind] for kind in MASTERS if kind in found.states), found)
    return _named(masters, config)


def fill(found: Checkpoint, config: DecoderConfig) -> int:
    """Rows of the embedding behind the model's words, which `weights` leaves out."""
    shape = found.shapes.get(_WORDS, (0,))
    return max(0, shape[0] - config.vocab_size)


def optimizer(found: Checkpoint, config: DecoderConfig) -> OptimizerState | None:
    """What it keeps of each parameter; None: nothing that can be read."""
    kinds = tuple(sorted(set(found.states) - set(MASTERS)))
    if not kinds:
        return None
    steps = max(found.iteration, found.updates or 0)
    skipped = steps - (found.updates or 0)
    return OptimizerState(
        kinds, found.updates, steps, skipped, lambda kind: _named(found.states[kind], config)
    )


def _named(found: Checkpoint, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """In the dtype that they have."""
    shapes = {name: torch.Size(shape) for name, shape in config.spec.shapes().items()}
    left, plan = set(found.shapes), []
    for ours, options, view in _rows(config):
        if ours not in shapes:
            continue
        place = next((p for p in options if p[0] in found.shapes), None)
        if place is None:
            raise UserError(f"{found.path}: holds no {options[0][0]}, where {ours} would be")
        left.discard(place[0])
        plan.append((ours, *place, view))
    if left:
        raise UserError(f"{found.path}: {sorted(left)[0]} is no part of this model")
    if missing := shapes.keys() - {row[0] for row in plan}:
        raise UserError(f"{found.path}: Megatron's model has no {sorted(missing)[0]}")
    for _, theirs, layer, _ in plan:
        if layer is not None and found.shapes[theirs][0] != config.num_layers:
            raise UserError(
                f"{found.path}: {theirs} is of {found.shapes[theirs][0]} layers, and by the config "
                f"there are {config.num_layers}; does it belong to these weights?"
            )
    return (
        (ours, _viewed(found, theirs, layer, view, shapes[ours]))
        for ours, theirs, layer, view in plan
    )


def _viewed(
    found: Checkpoint, theirs: str, layer: int | None, view: View, shape: torch.Size
) -> Tensor:
    fused = found.read(theirs, layer)
    try:
        part = view(fused)
        if part.shape == shape:
            return part
    except RuntimeError:  # it cannot be seen so
        pass
    raise UserError(
        f"{found.path}: {theirs} has the shape {tuple(fused.shape)}, which does not hold "
        f"{tuple(shape)} as the config says; does it belong to these weights?"
    )


def parts(config: DecoderConfig, named: Iterable[tuple[str, Tensor]]) -> Iterator[Part]:
    """Megatron's tensors of a stream of ours, each as soon as all of ours in it have come.

    Raises UserError for a part or a switch that Megatron's model does not have.
    """
    _refuse(config)
    rows = {ours: (options[0], view) for ours, options, view in _rows(config)}
    shapes = config.spec.shapes()
    within: dict[tuple[str, int | None], list[str]] = {}
    for ours in shapes:
        if ours not in rows:
            raise UserError(f"Megatron's model has no {ours}; write --to hf or native")
        within.setdefault(rows[ours][0], []).append(ours)
    waiting: dict[tuple[str, int | None], dict[str, Tensor]] = {}
    for ours, tensor in named:
        place = rows[ours][0]
        have = waiting.setdefault(place, {})
        have[ours] = tensor
        if len(have) < len(within[place]):
            continue
        fused = tensor.new_empty(sum(len(t) for t in have.values()), *tensor.shape[1:])
        for name, value in waiting.pop(place).items():
            # Which of their rows are ours: as for numbers of rows, so for rows.
            fused[rows[name][1](torch.arange(len(fused)))] = value
        yield Part(place[0], fused, place[1], config.num_layers)


# Modules that Transformer Engine would keep scales for; Megatron's own ask for them as well.
SCALED = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def objects(config: DecoderConfig) -> Iterator[str]:
    """Names of what modules keep besides tensors."""
    for layer in range(config.num_layers):
        for module in SCALED:
            yield f"{LAYERS}{module}._extra_state/shard_{layer}_{config.num_layers}"


Places = tuple[tuple[str, int | None], ...]  # names that it may have, and the layer of a stack


def _rows(config: DecoderConfig) -> Iterator[tuple[str, Places, View]]:
    """Our names, those of Megatron's that may hold them, and as which part."""

    def words(fused: Tensor) -> Tensor:
        return fused[: config.vocab_size]  # behind them it is filled up

    yield "embed.weight", ((_WORDS, None),), words
    yield "pos_embed.weight", (("embedding.position_embeddings.weight", None),), _all
    for layer in range(config.num_layers):
        for ours, options, view in _layer_rows(config):
            stacked = [(f"{LAYERS}{option}", layer) for option in options]
            single = [(f"{LAYERS}{layer}.{option}", None) for option in options]
            yield f"layers.{layer}.{ours}", (*stacked, *single), view
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", ((f"decoder.final_layernorm.{kind}", None),), _all
    yield "head.weight", (("output_layer.weight", None),), words


def _layer_rows(config: DecoderConfig) -> Iterator[tuple[str, tuple[str, ...], View]]:
    attn, mlp = "self_attention.", "mlp."
    groups, width = config.kv_heads, config.head_width
    shared = config.num_heads // groups

    def heads(start: int, end: int) -> View:
        return lambda fused: fused.view(groups, shared + 2, width, *fused.shape[1:])[
            :, start:end
        ].flatten(0, 2)

    for kind in ("weight", "bias"):
        fused = (f"{attn}linear_qkv.{kind}",)
        yield f"attn.q.{kind}", fused, heads(0, shared)
        yield f"attn.k.{kind}", fused, heads(shared, shared + 1)
        yield f"attn.v.{kind}", fused, heads(shared + 1, shared + 2)
        yield f"attn.o.{kind}", (f"{attn}linear_proj.{kind}",), _all
        if config.spec.layer.gated:
            yield f"mlp.gate.{kind}", (f"{mlp}linear_fc1.{kind}",), lambda fused: fused.chunk(2)[0]
            yield f"mlp.up.{kind}", (f"{mlp}linear_fc1.{kind}",), lambda fused: fused.chunk(2)[1]
        else:
            yield f"mlp.up.{kind}", (f"{mlp}linear_fc1.{kind}",), _all
        yield f"mlp.down.{kind}", (f"{mlp}linear_fc2.{kind}",), _all
        for norm, own, behind in (
            ("attn_norm", "input_layernorm", f"{attn}linear_qkv"),
            ("mlp_norm", "pre_mlp_layernorm", f"{mlp}linear_fc1"),
        ):
            yield f"{norm}.{kind}", (f"{behind}.layer_norm_{kind}", f"{own}.{kind}"), _all
    for norm in ("q", "k"):
        yield f"attn.{norm}_norm.weight", (f"{attn}{norm}_layernorm.weight",), _all


def _all(fused: Tensor) -> Tensor:
    return fused
