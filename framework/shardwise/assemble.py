"""The one function that turns a plain model into a distributed one, in a fixed order."""

from __future__ import annotations

import torch
from torch import nn

from shardwise.config.schema import EngineConfig, ModelConfig
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.parallel import blocks, data
from shardwise.parallel.mesh import Mesh
from shardwise.precision.policy import PRECISIONS


def assemble(model_config: ModelConfig, engine: EngineConfig, mesh: Mesh, seed: int) -> nn.Module:
    """A distributed model with its initial weights, a pure function of (seed, parameter name).

    Later guests have their line here: tensor-parallel, FP8 and adapter swaps come right after
    `build`, pipeline splitting before sharding.
    """
    precision = PRECISIONS[engine.precision]
    # 1. The plain model, without memory.
    with torch.device("meta"):
        model = registry.build(model_config).to(precision.master)
    # 2. Recompute and compile, per block.
    blocks.wrap_blocks(model, engine.recompute, blocks.wants_compile(engine.compile, mesh.device))
    # 3. ZeRO: parameters become shards.
    data.shard(model, mesh, precision.compute)
    # 4. Memory for this rank's shards alone, then their values.
    model.to_empty(device=mesh.device)
    init_weights(model, seed)
    return model
