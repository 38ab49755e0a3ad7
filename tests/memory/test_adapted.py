"""Memory of models with an adapter: what the formulas say is what the engine holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import Tensor

from shardwise.adapters.low_rank import LowRankAdapter
from shardwise.adapters.registry import build_adapter
from shardwise.config.adapters import AdapterConfig
from shardwise.losses.causal_lm import CausalLM
from shardwise.memory import Adapted, ModelShape, Part, Place, Work, occupancy
from shardwise.memory.formulas import master_shards
from shardwise.models.dense.llama import LlamaConfig
from shardwise.parallel.full_tensor import local_tensor
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.memory_inputs import model_shape, place_of
from tests.adapters.support import adapter, native
from tests.support import toy
from tests.support.pool import RankPool

MODEL = toy.llama(vocab_size=64, qkv_bias=False)
ASKED = {
    "dora": adapter("dora", init="pissa", targets=["q", "o", "down"]),
    "sequential": adapter("bottleneck"),
    "parallel": adapter("bottleneck", placement="parallel"),
    "nf4": adapter(quantise="nf4"),
    "int8": adapter("bottleneck", quantise="int8"),
}
WIDE = {"hidden_size": 128, "ffn_size": 256}  # rows that tp cuts into whole blocks
WORK = Work(12, 2, master_bytes=4, compute_bytes=4)


def model_of(asked: AdapterConfig) -> LlamaConfig:
    return MODEL.model_copy(update=WIDE if asked.quantise else {})


def held(layout: str, asked: AdapterConfig) -> dict[str, int]:
    """Bytes on this rank: of parameters, of gradients before an update, of moments."""
    engine: Any = native(model_of(asked), asked, layout, precision="fp32")
    batch = toy.batch(4).split(4 // engine.data_size)[engine.data_rank]
    engine.forward_backward([batch], CausalLM())

    def size(tensors: Any) -> int:
        return sum(local_tensor(t).nbytes for t in tensors)

    parameters: list[Tensor] = list(engine.named.parameters.values())
    few_bits = [b for kept in engine.named.quantised.values() for b in kept.buffers()]
    states = engine.optimizer.state.values()
    moments = [t for s in states for n, t in s.items() if n != "step"]
    return {
        "masters": size([*parameters, *few_bits]),
        "gradients": size(p.grad for p in parameters if p.grad is not None),
        "moments": size(moments),
    }


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("layout", ["tp2", "dp2.zero3"])
def test_formulas_are_what_ranks_hold(ranks: RankPool, layout: str, kind: str) -> None:
    asked = ASKED[kind]
    model = model_of(asked)
    shape = model_shape(model, build_adapter(asked, model).shape())
    place = place_of(model, parse_layout(layout, 2), 0, 1)
    found = occupancy(shape, place, WORK)
    for measured in ranks.run(held, layout, asked, world=2):
        assert measured == {
            "masters": found.master_shards,
            "gradients": found.gradients,
            "moments": found.optimizer_states,
        }


@pytest.mark.parametrize(("kind", "a_weight"), [("nf4", 0.516), ("int8", 1.005)])
def test_a_base_in_few_bits(kind: str, a_weight: float) -> None:
    whole = ModelShape(576, 30, 9, 3, 64, 1536, 49152)
    few = dataclasses.replace(whole, adapted=Adapted(quantised=kind))  # type: ignore[arg-type]
    place = Place((Part(30),))
    numbers = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    full, small = (master_shards(m, place, WORK) for m in (whole, few))
    assert (small - (full - 4 * numbers)) / numbers == pytest.approx(a_weight, abs=0.002)


def test_an_adapter_costs_a_tenth_of_the_states() -> None:
    whole = ModelShape(576, 30, 9, 3, 64, 1536, 49152)
    every = frozenset(("q", "k", "v", "o", "gate", "up", "down"))
    adapted = dataclasses.replace(
        whole, adapted=LowRankAdapter(adapter(rank=16), toy.llama()).shape()
    )
    assert adapted.adapted is not None and adapted.adapted.layers == every
    place = Place((Part(30),))
    full, small = (occupancy(m, place, WORK) for m in (whole, adapted))
    assert small.optimizer_states < 0.1 * full.optimizer_states
    assert small.peak_gradients < 0.1 * full.peak_gradients
    assert full.master_shards < small.master_shards < 1.1 * full.master_shards
    assert small.activations > full.activations
