"""Which of the two engines a setup asks for: with Megatron's own optimizer, or with ours."""

from __future__ import annotations

import torch.distributed as dist

from shardwise.engines.base import Setup
from shardwise.engines.megatron import model as models
from shardwise.engines.megatron import refusals
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.engines.megatron.core_engine import CoreOptimizerEngine
from shardwise.engines.megatron.engine import MegatronEngine
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.mesh import place_mesh


def build_engine(setup: Setup) -> MegatronEngine | None:
    """See `engines.registry.register_engine`. Raises ConfigError for what `refusals` tells."""
    assert isinstance(setup.config, MegatronConfig) and isinstance(setup.model, DecoderConfig)
    models.check_release()
    ranks = range(setup.layout.world) if setup.ranks is None else setup.ranks
    case = refusals.Case(
        setup.model,
        setup.config,
        setup.layout,
        setup.device.type,
        setup.optimizer,
        setup.trained,
        everywhere=len(ranks) == dist.get_world_size(),
    )
    refusals.check(case)
    mesh = place_mesh(setup.layout, setup.device, ranks)
    if mesh is None:
        return None
    if setup.optimizer is None or setup.config.optimizer == "native":
        return MegatronEngine(setup, mesh)
    if reason := refusals.of_core_optimizer(case):
        return MegatronEngine(setup, mesh, f"{reason}: ours updates")
    return CoreOptimizerEngine(setup, mesh)
