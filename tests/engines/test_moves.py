"""Checkpoints move between layouts: weights bitwise, training as if it had never moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise import checkpoint
from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from shardwise.verify.roles import world_of
from tests.support import toy
from tests.support.pool import RankPool

# Uneven on purpose: 61 words, 5 layers, tp and ZeRO along the same dimension.
CHAIN = (
    "dp2.zero2",
    "tp2.sp",
    "pp2.zbv",
    "dp2.zero3.tp2.sp",
    "cp2.ring",
    "dp2.zero3.pp2.interleaved",
    "dp4.hsdp2.zero3",
    "tp4",
    "pp4.1f1b",
    "dp2.zero1.cp2.ulysses",
    "dp1.zero0",
)
SLOW = pytest.mark.slow
MODELS = {
    "tied": toy.llama(num_layers=5),
    "untied": toy.llama(num_layers=5, tie_embeddings=False, num_kv_heads=4),
    "dropout": toy.gpt2(num_layers=5, attn_dropout=0.1, embed_dropout=0.1),
}


def _engine(name: str, layout: str) -> NativeEngine:
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    config = NativeConfig(layout=layout, precision="fp64", compile=False)
    optimizer = AdamWConfig(lr=3e-3)
    return NativeEngine(MODELS[name], config, mesh, seed=4, stage="s", optimizer=optimizer)


def _everything(engine: NativeEngine) -> dict[str, Tensor]:
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    return {f"{k}/{n}": t.clone() for k in kinds for n, t in engine.full(k)}


def _step(name: str, layout: str, root: str, step: int) -> dict[str, Any]:
    """Load what stands in ``root``, do step ``step``, save; what was loaded and what came of it."""
    engine = _engine(name, layout)
    state = engine.state_dict()
    if step:
        found = checkpoint.load_latest(Path(root), state.tensors)
        assert found is not None and found.step == step
        engine.load_state_dict(found.meta["engine"])
    loaded = _everything(engine)
    batch = toy.batch(8, 16, seed=step)
    share = 8 // engine.data_size
    rows = slice(engine.data_rank * share, (engine.data_rank + 1) * share)
    loss = engine.forward_backward(batch.map(lambda t: t[rows]).split(2), CausalLM())
    norm = engine.step(3e-3)
    state = engine.state_dict()
    checkpoint.save(Path(root), step + 1, state.tensors, {"engine": state.meta}, keep=1)
    return {"loaded": loaded, "made": _everything(engine), "loss": loss["loss"], "norm": norm}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "untied", "dropout"])
def test_a_chain_of_layouts_equals_one_process(ranks: RankPool, tmp_path: Path, name: str) -> None:
    before: dict[str, Tensor] = {}
    for step, layout in enumerate(CHAIN):
        [alone] = ranks.run(_step, name, "dp1.zero0", str(tmp_path / "one"), step, world=1)
        moved = ranks.run(
            _step, name, layout, str(tmp_path / "moved"), step, world=world_of(layout)
        )
        for found in moved:
            for key, value in before.items():
                assert torch.equal(found["loaded"][key], value), (layout, key)
        scale = {k: t.norm() for k, t in alone["made"].items()}
        total = torch.stack(list(scale.values())).norm()
        for key, value in alone["made"].items():
            gap = (moved[0]["made"][key] - value).norm()
            assert gap <= 1e-9 * scale[key] + 1e-12 * total, (layout, key)
        assert moved[0]["loss"] == pytest.approx(alone["loss"], rel=1e-9)
        assert moved[0]["norm"] == pytest.approx(alone["norm"], rel=1e-9)
        before = moved[0]["made"]
