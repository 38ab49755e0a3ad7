"""The one function that turns a plain model into a distributed one, in a fixed order.

What is done to a model is a list of transforms, each a table of its room: cut, quantise, adapt or
freeze, recompute and compile, shard. They swap or wrap modules that those before them left, and
tell what the engine must know: whose gradients are partial, what stands still, how it is merged.
"""

from __future__ import annotations

import dataclasses

import torch

from shardwise.adapters import quantise
from shardwise.adapters.base import Adapter
from shardwise.adapters.trained import EVERYTHING, Trained, TrainedPart
from shardwise.config.schema import ModelConfig, NativeConfig
from shardwise.errors import ConfigError
from shardwise.models import registry
from shardwise.models.common.blocks import Attention, is_exactly
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.init import init_weights
from shardwise.parallel import blocks, data, tensor
from shardwise.parallel.context import ContextAttention
from shardwise.parallel.layout import SPLIT_BACKWARD
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.pipeline import chunks_of, split_model
from shardwise.precision.fp8 import Fp8
from shardwise.precision.policy import precision_of


@dataclasses.dataclass(frozen=True)
class Assembled:
    """This rank's part of a model: one plain-looking model for each pipeline stage it holds."""

    chunks: dict[int, Decoder]  # by number of pipeline stage
    partial: frozenset[str]  # parameters whose gradients are partial sums over tp ranks
    fp8: Fp8 | None = None
    adapter: Adapter | None = None


def assemble(
    model_config: ModelConfig,
    engine: NativeConfig,
    mesh: Mesh,
    seed: int,
    trained: Trained = EVERYTHING,
    *,
    by_block: bool = False,
) -> Assembled:
    """A distributed model with its initial weights, a pure function of (seed, parameter name).

    ``by_block``: gradients of a block are reduced, and gone, before the next block's are there.
    Raises ConfigError for what ``trained`` asks of a model that cannot have it.
    """
    assert isinstance(model_config, DecoderConfig)
    compiled = blocks.wants_compile(engine, mesh.device)
    precision, layout = precision_of(engine.precision, mesh.device), mesh.layout
    parts = split_model(model_config, layout.num_chunks)
    table = registry.sharding(model_config)
    few_bits = None if trained.adapter is None else trained.adapter.quantise
    if few_bits is not None and engine.fp8 is not None:
        raise ConfigError(
            "adapter.quantise: engine.fp8 keeps weights in full for its backward pass; leave out "
            "one of them"
        )
    quantised = None if engine.fp8 is None else Fp8(engine, model_config, mesh)
    part = TrainedPart(trained, model_config)
    if part.adapter is not None and quantised is not None and quantised.library is not None:
        raise ConfigError(
            "engine.fp8.backend: Transformer Engine's layers take no adapter; set it to emulated"
        )
    chunks: dict[int, Decoder] = {}
    partial: set[str] = set()
    for number in chunks_of(layout, mesh.place["pp"]):
        # 1. The plain model, without memory.
        with torch.device("meta"):
            model = registry.build(model_config).to(precision.master)
        # 2. The layers of this pipeline stage.
        model.keep(parts[number])
        # 3. Tensor and context parallelism, by swapping modules.
        partial.update(tensor.parallelize(model, table, mesh, overlap=not compiled))
        if layout.cp > 1:
            cut_attention(model, ContextAttention(mesh.groups["cp"], layout.cp_kind))
        if layout.pp > 1 and layout.schedule in SPLIT_BACKWARD:
            tensor.defer_weight_products(model)
        # 4. FP8, by replacing the products of linear layers, cut or whole.
        if quantised is not None:
            quantised.attach(model)
        # 5. What is trained: an adapter, which takes part in those products, or parts of the model.
        partial.update(part.apply(model))
        if few_bits is not None:
            quantise.attach(model, few_bits, mesh, precision.compute)
        # 6. Recompute and compile, per block.
        checkpoint = quantised.checkpoint if quantised is not None else None
        breaks = layout.cp > 1 or few_bits is not None
        blocks.wrap_blocks(model, engine.recompute, compiled, checkpoint, breaks=breaks)
        # 7. ZeRO: parameters become shards.
        data.shard(model, mesh, precision.compute, by_block=by_block)
        # 8. Memory for this rank's shards alone, then their values.
        model.to_empty(device=mesh.device)
        init_weights(model, seed)
        quantise.init_weights(model, seed)
        chunks[number] = model
    return Assembled(chunks, frozenset(partial), quantised, part.adapter)


def cut_attention(model: Decoder, core: ContextAttention) -> None:
    """Give every layer's attention a core that reaches the tokens of other ranks.

    Raises ConfigError for a layer whose attention is not exactly `Attention`: it would see its own
    rank's tokens alone.
    """
    for i, block in enumerate(model.layers):
        if block is None:
            continue
        found = [m for m in block.modules() if is_exactly(m, Attention)]
        if not found or any(isinstance(m, Attention) and m not in found for m in block.modules()):
            raise ConfigError(
                f"layers.{i}: context parallelism knows the attention of `models.common.blocks`, "
                f"and this {type(block).__qualname__} has another; choose a layout without cp"
            )
        for attention in found:
            attention.core = core  # type: ignore[assignment,attr-defined]
