"""An engine on some ranks: the others learn sums, weights and state, and compute nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.engines.placed import PlacedEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.logprobs import valid_logprobs
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import place_mesh
from shardwise.rollout.weights import digest
from tests.support import toy
from tests.support.pool import RankPool

DEVICE = torch.device("cpu")


def build(layout: str, ranks: list[int]) -> tuple[PlacedEngine, NativeEngine | None]:
    parsed = parse_layout(layout, len(ranks))
    mesh = place_mesh(parsed, DEVICE, ranks)
    config = NativeConfig(layout=layout, precision="fp64", compile=False)
    model, optimizer = toy.llama(), AdamWConfig()
    inner = mesh and NativeEngine(model, config, mesh, seed=7, optimizer=optimizer)
    return PlacedEngine(inner, ranks, parsed.dp, DEVICE), inner


def update(layout: str, ranks: list[int]) -> dict[str, Any]:
    """One step of 4 rows; what every rank knows after it."""
    engine, inner = build(layout, ranks)
    assert (inner is not None) == (dist.get_rank() in ranks)
    mine = []
    if engine.data_rank >= 0:
        share = 4 // engine.data_size
        mine = toy.batch(4).split(share)[engine.data_rank].split(1)
    metrics = engine.forward_backward(mine, CausalLM())
    norm = engine.step(1e-3)
    assert inner is not None or (metrics == {} and norm == 0.0)
    rows = engine.forward(mine, valid_logprobs)
    total = engine.sum_over_data([sum(float(r.sum()) for r in rows), 1.0])
    return {
        "metrics": engine.broadcast(metrics),
        "norm": engine.broadcast(norm),
        "logprobs": total,
        "weights": {n: digest(t.float()) for n, t in engine.weights()},
        "updates": engine.state_dict().meta["updates"],
    }


def test_every_rank_learns_what_the_engines_ranks_know(ranks: RankPool) -> None:
    [alone] = ranks.run(update, "dp1.zero0", [0], world=1)
    for layout, where in (("dp1.zero0", [2]), ("dp2.zero2", [1, 2]), ("tp2.sp", [0, 2])):
        found = ranks.run(update, layout, where, world=3)
        for other in found:
            assert other["weights"] == found[0]["weights"]
            assert other["updates"] == 1
            assert other["norm"] == found[0]["norm"]
            assert abs(other["norm"] / alone["norm"] - 1) < 1e-9
            assert abs(other["metrics"]["loss"] - alone["metrics"]["loss"]) < 1e-9
            assert abs(other["logprobs"][0] - alone["logprobs"][0]) < 1e-7


def overlap() -> list[float]:
    """Engines on disjoint ranks: calls that compute wait for nobody outside."""
    first, _ = build("dp1.zero0", [0])
    second, _ = build("dp1.zero0", [1])
    losses = []
    for engine in (first, second):
        mine = toy.batch(2).split(2) if engine.data_rank >= 0 else []
        losses.append(engine.forward_backward(mine, CausalLM()))
    return [e.broadcast(m)["loss"] for e, m in zip((first, second), losses, strict=True)]


def test_engines_on_disjoint_ranks(ranks: RankPool) -> None:
    for a, b in ranks.run(overlap, world=2):
        assert a == b
