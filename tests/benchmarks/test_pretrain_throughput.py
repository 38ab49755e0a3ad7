"""Self-checks of the throughput benchmark: fair contestants, right arithmetic, a run to the end."""

from __future__ import annotations

from typing import Any

import common
import pretrain_throughput as bench
import pytest
import torch
from peers.handwritten import Loop, Model

from shardwise.metrics.timing import Laps
from tests.support.pool import RankPool

TINY = bench.SHAPES["tiny"]


def test_laps_pair_the_turns() -> None:
    laps = Laps()
    for ours, peer in [(1.0, 2.0), (10.0, 20.0), (1.0, 9.0)]:  # a disturbance in the second turn
        laps.add("ours", ours)
        laps.add("peer", peer)
    assert laps.ratio("ours", "peer") == 2.0
    assert laps.median("ours") == 1.0


def test_table_aligns_columns() -> None:
    lines = common.table(["", "x"], [["a", 1], ["bbb", 22]]).splitlines()
    assert lines == ["      x", "---  --", "a     1", "bbb  22"]


@pytest.mark.parametrize("name,millions", [("17M", 17), ("110M", 110)])
def test_shapes_have_their_names_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = Model(bench.SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def losses() -> dict[str, Any]:
    """Ours and both hand-written loops from the same weights, three steps in bf16."""
    rows = bench.RandomRows(TINY)
    stage = bench.our_stage(TINY, rows, compile=False)
    ours = {n: p.detach() for n, p in stage.engine.model.named_parameters()}
    loops = {kind: Loop(TINY, kind, compile=False) for kind in ("autocast", "masters")}
    names = {"norm1": "attn_norm", "norm2": "mlp_norm", **{n: f"attn.{n}" for n in "qkvo"}}
    names |= {n: f"mlp.{n}" for n in ("gate", "up", "down")}
    for loop in loops.values():
        for (name, p), master in zip(loop.model.named_parameters(), loop.masters, strict=True):
            path = name.split(".")
            if path[0] == "layers":
                path[2] = names[path[2]]
            with torch.no_grad():
                p.copy_(ours[".".join(path)])
                master.copy_(ours[".".join(path)])
    out: dict[str, Any] = {"ours": [], "autocast": [], "masters": []}
    for step in range(3):
        out["ours"].append(stage.train_step(step, 3e-4)["loss"])
        for kind, loop in loops.items():
            out[kind].append(loop.step(*rows.pairs(step * TINY.batch, TINY.batch)))
    return out


def test_contestants_train_the_same_model(ranks: RankPool) -> None:
    [found] = ranks.run(losses, world=1)
    for kind in ("autocast", "masters"):
        assert found[kind] == pytest.approx(found["ours"], rel=5e-3)
    assert found["ours"][0] != found["ours"][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision,peers", [("bf16", {bench.HAND, bench.MASTERS}), ("fp32", {bench.HAND})]
)
def test_runs_to_the_end(precision: str, peers: set[str]) -> None:
    pytest.importorskip("accelerate")
    turns = ["--models", "tiny", "--turns", "2", "--warmup", "1", "--threads", "1"]
    result: dict[str, Any] = bench.main([*turns, "--no-compile", "--precision", precision])
    speeds = result["tiny"]["tokens_per_second"]
    assert set(speeds) == {bench.OURS, bench.TRAINER, *peers}
    assert all(v > 0 for v in speeds.values())
