"""A base in few bits: on every layout the plain engine's numbers, and the memory as promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwise.adapters.quantise import names, quantised, read_back
from shardwise.engines.native import NativeEngine
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.verify.pool import RankError
from tests.adapters.support import (
    adapter,
    assert_alike,
    native,
    plain,
    train,
    train_native,
    update,
    worst,
)
from tests.support import toy
from tests.support.daily import daily
from tests.support.pool import RankPool

NF4 = adapter(quantise="nf4", targets=["all-linear", "head"])
INT8 = adapter("dora", quantise="int8", init="pissa", rslora=True)
UNTIED: dict[str, Any] = {"tie_embeddings": False}


@pytest.mark.parametrize("layout", daily(["dp2.zero3", "tp2.sp", "pp2"], 1))
def test_a_layout_changes_nothing(ranks: RankPool, layout: str) -> None:
    """Of rows that are not whole blocks, which tp cuts within."""
    for asked in (NF4, INT8):
        assert_alike(ranks, toy.llama(**UNTIED), asked, layout, 1)


def test_shared_heads_and_working_precision(ranks: RankPool) -> None:
    dora = adapter("dora", quantise="nf4")
    model = toy.llama(num_kv_heads=1, qkv_bias=True)
    assert_alike(ranks, model, dora, "tp2")
    wanted = train(plain(model, dora, "bf16"))
    found = ranks.run(train_native, model, dora, "dp2.zero2", world=2, precision="bf16")[0]
    first = {n: v for n, v in wanted.items() if n.startswith(("initial", "0 "))}
    error, name = worst({n: found[n] for n in first}, first)
    assert error < 0.05, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["dp2.zero3.tp2.sp", "tp2.sp.pp2.zbv", "dp4.hsdp2.zero3", "tp4", "cp2.pp2"]
)
def test_axes_together(ranks: RankPool, layout: str) -> None:
    for asked in (NF4, INT8):
        assert_alike(ranks, toy.llama(**UNTIED, num_layers=4), asked, layout, 1)


def held(model: Any, asked: Any, layout: str) -> tuple[int, int, bool]:
    """Bytes and elements of the quantised weights here, and whether an update left them alone."""
    engine = native(model, asked, layout, precision="fp32")
    assert isinstance(engine, NativeEngine)
    kept = [k for chunk in engine.modules() for _, k in quantised(chunk)]
    before = [b.clone() for k in kept for b in k.buffers()]
    update(engine, 0)
    after = [b for k in kept for b in k.buffers()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    parameters = {n for chunk in engine.modules() for n, _ in chunk.named_parameters()}
    assert not parameters & set(names(model))  # nothing beside them
    return sum(b.nbytes for b in before), sum(k.shape.numel() for k in kept), same


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.53), ("int8", 1.04)])
def test_bytes_a_weight(ranks: RankPool, kind: str, most: float) -> None:
    model = toy.llama(hidden_size=128, ffn_size=256, **UNTIED)
    asked = adapter(quantise=kind)
    for layout, ranks_of_a_weight in (("tp2", 2), ("dp2.zero3", 2), ("dp2.zero2", 1)):
        for num_bytes, num_weights, same in ranks.run(held, model, asked, layout, world=2):
            assert same
            assert num_bytes <= most * num_weights / ranks_of_a_weight
            assert num_bytes >= 0.9 * most * num_weights / ranks_of_a_weight


def test_read_back_is_what_computes(ranks: RankPool) -> None:
    model = toy.llama(**UNTIED)
    whole = registry.build(model)
    init_weights(whole, 7)
    weights = {n: p.data for n, p in whole.named_parameters()}
    engine = ranks.run(full_weights, model, NF4, world=1)[0]
    for name, value in read_back(weights.items(), "nf4", model):
        assert torch.equal(value.double(), engine[name]), name
        assert torch.equal(value, weights[name]) == (name not in names(model))


def full_weights(model: Any, asked: Any) -> dict[str, torch.Tensor]:
    return dict(native(model, asked).full("weights"))


def test_fp8_beside_it_is_refused(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"adapter\.quantise: engine\.fp8"):
        ranks.run(native_with_fp8, toy.llama(), NF4, world=1)


def native_with_fp8(model: Any, asked: Any) -> None:
    native(model, asked, precision="bf16", fp8={"recipe": "current"})


def test_a_weight_that_the_form_cannot_hold_is_named() -> None:
    form = torch.full((2, 64), 1e6)
    with pytest.raises(ValueError, match="fp16"):
        list(read_back([("layers.0.attn.q.weight", form)], "int8", toy.llama()))
