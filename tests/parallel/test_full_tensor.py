"""Global tensors from parts that two cuts left uneven."""

from __future__ import annotations

import torch
import torch.distributed as dist

from shardwise.config.schema import NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.models.common.init import init_spec, init_tensor
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from tests.support import toy
from tests.support.pool import RankPool

# 61 words over 2 tp ranks over 2 data ranks: 31 and 30, then 16, 15, 15, 15.
MODEL = toy.llama(num_layers=4)


def _differences(layout: str) -> list[str]:
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    config = NativeConfig(layout=layout, precision="fp64", compile=False)
    engine = NativeEngine(MODEL, config, mesh, seed=5)
    return [
        name
        for name, value in engine.full("weights")
        if not torch.equal(
            value,
            init_tensor(name, tuple(value.shape), init_spec(name, MODEL.spec), 5).double(),
        )
    ]


def test_initial_weights_are_the_same_on_every_layout(ranks: RankPool) -> None:
    for layout in ("dp2.tp2.zero3", "tp4.sp", "pp2.dp2", "tp2.pp2.zbv", "dp4.hsdp2"):
        assert ranks.run(_differences, layout, world=4) == [[]] * 4
