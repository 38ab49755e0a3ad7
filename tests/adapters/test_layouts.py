"""Adapters on every axis of a layout: the numbers of the plain engine, which has its own."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.config.adapters import FreezeConfig
from shardwise.verify.pool import RankError
from tests.adapters.support import adapter, assert_alike, native
from tests.support import toy
from tests.support.daily import daily
from tests.support.pool import RankPool

UNTIED: dict[str, Any] = {"tie_embeddings": False, "dropout": 0.1}
ASKED: dict[str, Any] = {
    "lora": adapter(dropout=0.2, targets=["all-linear", "head", "embed"]),
    "dora": adapter("dora", init="pissa", rslora=True, dropout=0.2),
    "sequential": adapter("bottleneck", size=6, init_std=0.1),
    "parallel": adapter(
        "bottleneck", size=5, placement="parallel", activation="gelu", init_std=0.1
    ),
}
LAST = FreezeConfig(train_last=1, patterns=["layers.1.attn.[qk].*"])


@pytest.mark.parametrize("layout", daily(["dp2.zero3", "tp2.sp", "pp2", "cp2"], 1))
def test_a_layout_changes_nothing(ranks: RankPool, layout: str) -> None:
    for asked in ASKED.values():
        assert_alike(ranks, toy.llama(**UNTIED), asked, layout, 1)


def test_other_models_and_parts(ranks: RankPool) -> None:
    shared = toy.llama(num_kv_heads=1, qkv_bias=True)
    assert_alike(ranks, shared, adapter("dora", init="orthogonal"), "tp2")
    own = adapter(
        "dora", rslora=True, rank_pattern={"q": 2, "layers.1.*": 3}, alpha_pattern={"down": 5.0}
    )
    assert_alike(ranks, toy.llama(), own, "tp2")
    gpt2 = toy.gpt2(tie_embeddings=False)
    assert_alike(ranks, gpt2, adapter(targets=["pos_embed", "o"]), "tp2.sp")
    for placement in ("sequential", "parallel"):
        asked = adapter("bottleneck", placement=placement, size=8, quantise="nf4")
        assert_alike(ranks, gpt2, asked, "tp2")
    assert_alike(ranks, toy.llama(), LAST, "dp2.zero2")


@pytest.mark.slow
def test_three_axes_together(ranks: RankPool) -> None:
    for kind in ("lora", "parallel"):
        assert_alike(ranks, toy.llama(**UNTIED), ASKED[kind], "dp2.zero3.tp2.sp", 1)


def test_products_with_the_base_may_be_quantised(ranks: RankPool) -> None:
    sentinel = {"enabled": False}
    ends = {"first_layers": 0, "last_layers": 0}
    both: dict[str, Any] = {"fp8": {"recipe": "current", "sentinel": sentinel, **ends}}
    for kind in ("lora", "parallel"):
        assert_alike(ranks, toy.llama(**UNTIED), ASKED[kind], "dp1", both=both)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize(
    "layout", ["dp4.hsdp2.zero3", "dp2.zero1.tp2", "tp2.sp.pp2.zbv", "dp2.zero3.tp2.sp", "tp4.sp"]
)
def test_axes_together(ranks: RankPool, layout: str, kind: str) -> None:
    if kind == "parallel" and layout == "tp4.sp":
        with pytest.raises(RankError, match=r"adapter\.size: 5 features leave a rank of tp4 none"):
            ranks.run(native, toy.llama(), ASKED[kind], layout, world=4)
        return
    assert_alike(ranks, toy.llama(**UNTIED, num_layers=4), ASKED[kind], layout, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "sequential", "parallel"])
@pytest.mark.parametrize("keys", [{"compile": True}, {"recompute": "full"}])
def test_compiled_and_recomputed_blocks(ranks: RankPool, keys: dict[str, Any], kind: str) -> None:
    assert_alike(ranks, toy.llama(**UNTIED), ASKED[kind], "pp2", 1, **keys)
