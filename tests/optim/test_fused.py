"""LOMO's gradients: never more than a tensor's or a block's at once, measured on live tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from benchmarks import occupancy
from shardwise.config.optimizers import LomoConfig, OptimizerConfig, SgdConfig
from shardwise.config.schema import NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.errors import ShardwiseError
from shardwise.losses.causal_lm import CausalLM
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from tests.support import toy
from tests.support.pool import RankPool

LOMO, SGD = LomoConfig(kind="lomo"), SgdConfig(kind="sgd", momentum=0.0)


def engine_of(layout: str, precision: str, optimizer: OptimizerConfig) -> NativeEngine:
    sizes = {"hidden_size": 64, "num_layers": 4, "ffn_size": 160, "vocab_size": 128}
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    keys = {"layout": layout, "compile": False, "precision": precision, "max_grad_norm": 0.0}
    config = NativeConfig.model_validate(keys)
    return NativeEngine(toy.llama(**sizes), config, mesh, seed=3, optimizer=optimizer)


def measured(layout: str, precision: str) -> list[dict[str, int]]:
    """Of LOMO by measure and by the formulas, and of SGD by measure."""
    found = []
    for optimizer in (LOMO, SGD):
        it = engine_of(layout, precision, optimizer)
        batch = toy.batch(8 // it.data_size, tokens=32, vocab=128)
        found.append(occupancy.measure(it, [batch]))
        if optimizer is LOMO:
            found.append(occupancy.formula(it, [batch], "lomo"))
    return found


@pytest.mark.parametrize(
    ("layout", "precision"),
    [("dp1.zero0", "fp32"), ("dp1.zero0", "bf16"), ("dp2.zero1", "fp32"), ("dp2.zero3", "bf16")],
)
def test_no_buffer_of_gradients(ranks: RankPool, layout: str, precision: str) -> None:
    world = 2 if "dp2" in layout else 1
    for lomo, formula, sgd in ranks.run(measured, layout, precision, world=world):
        assert lomo["gradients"] == lomo["optimizer_states"] == 0 < sgd["gradients"]
        assert lomo["peak_gradients"] < 0.6 * sgd["peak_gradients"]
        assert lomo["peak_gradients"] <= 1.05 * formula["peak_gradients"]


def refusals() -> list[str]:
    """What an engine says of no rate, two micro-batches, and gradients that are not finite."""
    it, loss, said = engine_of("dp1.zero0", "fp32", LOMO), CausalLM(), []
    batch = toy.batch(4, tokens=16, vocab=128)
    for batches, lr in (([batch], None), (batch.split(2), 1e-3)):
        try:
            it.forward_backward(batches, loss, lr)
        except RuntimeError as error:
            said.append(str(error))
    it.named.parameters["norm.weight"].data[0] = math.nan
    it.forward_backward([batch], loss, 1e-3)
    try:
        it.step(1e-3)
    except ShardwiseError as error:
        said.append(str(error))
    return said


def test_what_cannot_be_is_said(ranks: RankPool) -> None:
    [said] = ranks.run(refusals, world=1)
    assert len(said) == 3
    assert "the rate before it" in said[0] and "(given: 2)" in said[1]
    assert "go on from the last checkpoint" in said[2]
