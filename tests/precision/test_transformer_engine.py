"""The whole Transformer Engine path on a stand-in, against the emulation."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardwise.config.schema import EngineConfig, OptimizerConfig
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.parallel.layout import parse_layout, world_of
from shardwise.parallel.mesh import build_mesh
from tests.contracts.signatures import groups
from tests.contracts.transformer_engine import installed
from tests.support import toy
from tests.support.pool import RankPool

RELEASES = groups("transformer_engine")
MODELS = {
    "llama": toy.llama(num_kv_heads=4, hidden_size=128, ffn_size=64),
    "wide": toy.llama(num_kv_heads=4, hidden_size=256, ffn_size=256),  # two tiles of a block
    "gpt2": toy.gpt2(hidden_size=128, dropout=0.0),
}


def train(
    layout: str, recipe: str, release: str | None, model: str = "llama", **engine: Any
) -> dict[str, Any]:
    """Three steps by the library's stand-in, or emulated; everything that they leave."""
    fp8 = {
        "recipe": recipe,
        "backend": "te" if release else "emulated",
        "amax_history_len": 2,
        "first_layers": 0,
        "last_layers": 0,
    }
    config = EngineConfig.model_validate(
        {"layout": layout, "compile": False, "precision": "fp64", "fp8": fp8} | engine
    )
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    out: dict[str, Any] = {"loss": [], "norms": []}
    with installed(release) if release else contextlib.nullcontext() as state:
        it = NativeEngine(
            MODELS[model], config, mesh, seed=7, stage="t", optimizer=OptimizerConfig(eps=1e-4)
        )
        for step in range(3):
            batch = toy.batch(4, tokens=8, seed=step)
            mine = batch.split(4 // it.data_size)[it.data_rank].split(1)
            out["loss"].append(it.forward_backward(mine, CausalLM())["loss"])
            if step == 0:
                out["grads"] = dict(it.full("grads"))
            out["norms"].append(it.step(1e-2))
        out["fp8"] = {n: t.clone() for n, t in it.state_dict().tensors.items() if "fp8" in n}
        out["modules"] = list(state.calls) if state else []
    return out


def far(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """What differs by more than rounding."""
    found = []
    for name, grad in want["grads"].items():
        if not torch.allclose(got["grads"][name], grad, rtol=0, atol=1e-9 * float(grad.norm())):
            found.append(f"gradient {name}")
    for kind in ("loss", "norms"):
        if got[kind] != pytest.approx(want[kind], rel=1e-9):
            found.append(kind)
    found += [n for n, t in got["fp8"].items() if not torch.equal(t, want["fp8"][n])]
    return found


@pytest.mark.parametrize(
    "model,layout,recipe",
    [
        ("llama", "dp1.zero0", "delayed"),
        ("gpt2", "dp1.zero0", "current"),
        ("wide", "dp1.zero0", "block"),
        ("llama", "tp2", "delayed"),
        ("llama", "tp2", "current"),
        ("llama", "tp2.sp", "delayed"),
        ("llama", "tp2.sp", "current"),
        ("wide", "tp2.sp", "block"),
        ("llama", "tp2.sp", "mxfp8"),
        ("gpt2", "tp2.sp", "delayed"),
        ("gpt2", "dp2.zero3", "mxfp8"),
        ("llama", "dp2.zero2", "delayed"),
        ("llama", "pp2.1f1b", "delayed"),
    ],
)
def test_equals_the_emulation(ranks: RankPool, model: str, layout: str, recipe: str) -> None:
    world = world_of(layout)
    want = ranks.run(train, layout, recipe, None, model, world=world)
    got = ranks.run(train, layout, recipe, RELEASES[-1], model, world=world)
    for mine, theirs in zip(got, want):
        assert far(mine, theirs) == []
    fused = recipe in ("block", "mxfp8") or model == "gpt2"  # whose mlp has one layer in front
    assert ("LayerNormLinear" in got[0]["modules"]) == fused


@pytest.mark.parametrize("release", RELEASES[:-1])
def test_every_release_is_called_rightly(ranks: RankPool, release: str) -> None:
    for recipe in ("delayed", "mxfp8"):
        [got] = ranks.run(train, "dp1.zero0", recipe, release, "gpt2", world=1)
        [want] = ranks.run(train, "dp1.zero0", recipe, None, "gpt2", world=1)
        assert far(got, want) == []
