"""A run may change its engine after any update, as if it had never moved."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise import checkpoint
from shardwise.config.registry import ENGINE_CONFIGS
from shardwise.config.schema import NativeConfig
from shardwise.engines.base import Engine
from shardwise.engines.registry import as_kind
from tests.support import toy
from tests.support.daily import daily
from tests.support.engines import LR, assert_near, copies, engine, update
from tests.support.pool import RankPool

PACKAGES = {"native": "torch", "deepspeed": "deepspeed", "megatron": "megatron.core"}
# Every engine after every other one, and after itself on another layout. In fp32 DeepSpeed, too.
# Behind a colon, whose optimizer Megatron's is; without one, its own.
CHAINS = {
    "fp32": [
        ("native", "dp2.zero3"),
        ("deepspeed", "dp2.zero2"),
        ("deepspeed", "dp2.zero3"),
        ("native", "tp2"),
        ("megatron", "tp2.sp"),
        ("deepspeed", "dp2.zero1"),
        ("megatron", "dp2.zero1"),
        ("native", "dp2.zero1"),
    ],
    "fp64": [
        ("native", "dp2.zero2"),
        ("megatron", "tp2.sp"),
        ("native", "pp2"),
        ("megatron", "pp2"),
        ("megatron", "dp2.zero1"),
        ("megatron:native", "pp2"),
        ("megatron", "dp2.zero0"),
        ("native", "tp2"),
    ],
}
BOUNDS = {"fp32": (1e-4, 2e-4), "fp64": (1e-9, 1e-7)}  # of loss and norm, of tensors
MODEL = toy.llama(num_layers=3, tie_embeddings=True)
KINDS = ("weights", "exp_avg", "exp_avg_sq")


def build(kind: str, layout: str, precision: str) -> Engine:
    base = NativeConfig(layout=layout, precision=precision, compile=False)
    kind, _, whose = kind.partition(":")
    own: dict[str, Any] = {}
    if "cpu_shim" in ENGINE_CONFIGS[kind].model_fields:
        own = {"cpu_shim": True, "optimizer": whose or "megatron"}
    return engine(as_kind(base, kind, **own), MODEL)


def step(kind: str, layout: str, precision: str, root: Path, number: int) -> dict[str, Any]:
    """Load what stands in ``root``, make an update, save; what was loaded and what came of it."""
    it = build(kind, layout, precision)
    if number:
        state = it.state_dict()
        found = checkpoint.load_latest(root, state.tensors)
        assert found is not None and found.step == number
        it.load_state_dict(found.meta["engine"])
    loaded = {kind: copies(it, kind) for kind in KINDS}
    loss = update(it, number, [2, 2] if it.data_size == 2 else [2])["loss"]
    norm = it.step(LR)
    state = it.state_dict()
    checkpoint.save(root, number + 1, state.tensors, {"engine": state.meta}, keep=1)
    made = {kind: copies(it, kind) for kind in KINDS}
    it.close()
    return {"loaded": loaded, "made": made, "figures": [loss, norm]}


@pytest.mark.parametrize("precision", daily(CHAINS, 0))
def test_a_chain_of_engines_is_one_run(precision: str, ranks: RankPool, tmp_path: Path) -> None:
    """What is loaded is what was saved, bit by bit; what comes of it is one process's."""
    chain = [
        (k, x)
        for k, x in CHAINS[precision]
        if find_spec(PACKAGES[k.partition(":")[0]].split(".")[0])
    ]
    of_figures, of_tensors = BOUNDS[precision]
    before: dict[str, dict[str, Tensor]] = {}
    for number, (kind, layout) in enumerate(chain):
        moved = ranks.run(step, kind, layout, precision, tmp_path / "moved", number, world=2)
        [stayed] = ranks.run(step, "native", "dp1", "fp64", tmp_path / "stayed", number, world=1)
        for rank in moved:
            assert rank["figures"] == pytest.approx(stayed["figures"], rel=of_figures)
            for what, tensors in before.items():
                assert all(torch.equal(rank["loaded"][what][n], t) for n, t in tensors.items())
            for what in KINDS:
                assert_near(rank["made"][what], stayed["made"][what], of_tensors, f"{kind} {what}")
        before = moved[0]["made"]
