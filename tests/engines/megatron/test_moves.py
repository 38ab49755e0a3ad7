"""A run may change between the native engine and this one, as if it had never moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise import checkpoint
from shardwise.config.load import load_config
from shardwise.config.schema import AdamWConfig, EngineConfig, NativeConfig
from shardwise.engines.base import Engine, Setup
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.engines.registry import build_engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.parallel.layout import parse_layout
from shardwise.stages.lineage import identity
from tests.support import toy
from tests.support.pool import RankPool

pytest.importorskip("megatron.core")

CHAIN = (
    ("native", "dp2.zero2"),
    ("megatron", "tp2.sp"),
    ("native", "pp2"),
    ("megatron", "dp2"),
    ("megatron", "pp2"),
    ("native", "tp2"),
)
MODEL = toy.llama(num_layers=3)


def engine_config(kind: str, layout: str) -> EngineConfig:
    if kind == "native":
        return NativeConfig(layout=layout, precision="fp64", compile=False)
    return MegatronConfig(kind="megatron", layout=layout, precision="fp64", cpu_shim=True)


def build(kind: str, layout: str) -> Engine:
    parsed = parse_layout(layout, dist.get_world_size())
    config, device = engine_config(kind, layout), torch.device("cpu")
    return build_engine(Setup(MODEL, config, parsed, device, 4, "s", AdamWConfig(lr=3e-3)))


def everything(engine: Engine) -> dict[str, Tensor]:
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    return {f"{k}/{n}": t.clone() for k in kinds for n, t in engine.full(k)}


def step(kind: str, layout: str, root: str, number: int) -> dict[str, Any]:
    """Load what stands in ``root``, do a step, save; what was loaded and what came of it."""
    engine = build(kind, layout)
    state = engine.state_dict()
    if number:
        found = checkpoint.load_latest(Path(root), state.tensors)
        assert found is not None and found.step == number
        engine.load_state_dict(found.meta["engine"])
    loaded = everything(engine)
    share = toy.batch(8, 16, seed=number).split(8 // engine.data_size)[engine.data_rank]
    loss = engine.forward_backward(share.split(2), CausalLM())["loss"]
    norm = engine.step(3e-3)
    state = engine.state_dict()
    checkpoint.save(Path(root), number + 1, state.tensors, {"engine": state.meta}, keep=1)
    made = everything(engine)
    engine.close()
    return {"loaded": loaded, "made": made, "figures": [loss, norm]}


def test_a_chain_of_engines_equals_one_native_process(ranks: RankPool, tmp_path: Path) -> None:
    before: dict[str, Tensor] = {}
    for number, (kind, layout) in enumerate(CHAIN):
        moved = ranks.run(step, kind, layout, str(tmp_path / "moved"), number, world=2)
        stayed = ranks.run(step, "native", "dp1", str(tmp_path / "stayed"), number, world=1)[0]
        for rank in moved:
            assert rank["figures"] == pytest.approx(stayed["figures"], rel=1e-9)
            if number:
                assert all(torch.equal(rank["loaded"][n], t) for n, t in before.items())
            for name, value in stayed["made"].items():
                assert torch.allclose(rank["made"][name], value, rtol=1e-7, atol=1e-12), name
        before = moved[0]["made"]


def test_checkpoints_of_one_kind_are_the_others(tmp_path: Path) -> None:
    def said(**engine: Any) -> str:
        model = {"family": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
        model |= {"num_kv_heads": 2, "ffn_size": 32}
        stage = {"kind": "sft", "steps": 1, "task": {"kind": "count_letters"}, "engine": engine}
        run = load_config({"model": model, "stages": [stage], "run_dir": str(tmp_path)}).config
        return json.dumps(identity(run, run.stages[0], ""), sort_keys=True)

    assert said(kind="megatron", layers="local") == said(kind="native", recompute="full")
    assert said(kind="megatron", precision="bf16") != said(kind="native", precision="fp32")
