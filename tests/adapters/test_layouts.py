"""Adapters on every axis of a layout: the numbers of the plain engine, which has its own."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.config.adapters import FreezeConfig
from tests.adapters.support import adapter, plain, train, train_native, worst
from tests.support import toy
from tests.support.pool import RankPool

UNTIED: dict[str, Any] = {"tie_embeddings": False, "dropout": 0.1}
LORA = adapter(dropout=0.2, targets=["all-linear", "head", "embed"])
DORA = adapter("dora", init="pissa", rslora=True, dropout=0.2)
LAST = FreezeConfig(train_last=1, patterns=["layers.1.attn.[qk].*"])


@pytest.mark.parametrize("layout", ["dp2.zero3", "tp2.sp", "pp2", "cp2"])
def test_a_layout_changes_nothing(ranks: RankPool, layout: str) -> None:
    model = toy.llama(**UNTIED)
    for asked in (LORA, DORA):
        wanted = train(plain(model, asked))
        for found in ranks.run(train_native, model, asked, layout, 1, world=2):
            error, name = worst(found, wanted)
            assert error < 1e-9, name


def test_shared_heads_and_position_tables_are_adapted(ranks: RankPool) -> None:
    orthogonal = adapter("dora", init="orthogonal")
    cases = [
        (toy.llama(num_kv_heads=1, qkv_bias=True), orthogonal, "tp2"),
        (toy.gpt2(tie_embeddings=False), adapter(targets=["pos_embed", "o"]), "tp2.sp"),
        (toy.llama(), LAST, "dp2.zero2"),
    ]
    for model, asked, layout in cases:
        wanted = train(plain(model, asked))
        for found in ranks.run(train_native, model, asked, layout, world=2):
            error, name = worst(found, wanted)
            assert error < 1e-9, (name, layout)


def test_three_axes_together(ranks: RankPool) -> None:
    model = toy.llama(**UNTIED)
    wanted = train(plain(model, LORA))
    for found in ranks.run(train_native, model, LORA, "dp2.zero3.tp2.sp", 1, world=4):
        error, name = worst(found, wanted)
        assert error < 1e-9, name


def test_products_with_the_base_may_be_quantised(ranks: RankPool) -> None:
    sentinel = {"enabled": False}
    ends = {"first_layers": 0, "last_layers": 0}
    keys: dict[str, Any] = {"fp8": {"recipe": "current", "sentinel": sentinel, **ends}}
    model = toy.llama(**UNTIED)
    wanted = train(plain(model, LORA, **keys))
    [found] = ranks.run(train_native, model, LORA, "dp1", world=1, **keys)
    error, name = worst(found, wanted)
    assert error < 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["dp4.hsdp2.zero3", "dp2.zero1.tp2", "tp2.sp.pp2.zbv", "dp2.zero3.tp2.sp", "tp4.sp"]
)
def test_axes_together(ranks: RankPool, layout: str) -> None:
    model = toy.llama(**UNTIED, num_layers=4)
    for asked in (LORA, DORA):
        wanted = train(plain(model, asked))
        for found in ranks.run(train_native, model, asked, layout, 1, world=4):
            error, name = worst(found, wanted)
            assert error < 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"compile": True}, {"recompute": "full"}])
def test_compiled_and_recomputed_blocks_know_their_dropout(
    ranks: RankPool, keys: dict[str, Any]
) -> None:
    model = toy.llama(**UNTIED)
    wanted = train(plain(model, DORA))
    for found in ranks.run(train_native, model, DORA, "pp2", 1, world=2, **keys):
        error, name = worst(found, wanted)
        assert error < 1e-9, name
