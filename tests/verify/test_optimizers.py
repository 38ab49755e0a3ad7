"""Every kind of optimizer under ZeRO, tp and pp is what one process computes, resumed or not."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.verify import suite
from shardwise.verify.verifier import Verifier
from tests.support.daily import daily
from tests.support.pool import RankPool

BATCH = {"global_batch": 8, "micro_batch": 2, "seq_len": 64}
GROUPS = [{"match": "layers.*.attn.*", "lr_scale": 2.0, "weight_decay": 0.3}]
# One layout a kind every day. Where a state is no second weight, with a resume on the same layout,
# on another and on one process.
DAILY = {
    "lion": "tp2.sp",
    "muon": "dp2.zero3.tp2",
    "adafactor": "dp2.zero2.tp2",
    "adamw8bit": "dp2.zero3",
    "schedule_free": "pp2.1f1b",
    "lomo": "dp2.zero3",
    "adalomo": "tp2.sp",
}
RESUMED = ("adamw8bit", "schedule_free")
# Weights move in the backward pass: one micro-batch, no clipping, no pipeline.
FUSED = ("lomo", "adalomo")
LAYOUTS = (
    "dp2.zero0", "dp2.zero1", "dp2.zero2", "dp2.zero3", "dp4.hsdp2.zero3", "tp2.sp", "pp2.zbv",
    "dp2.zero3.tp2.sp.pp2.1f1b",
)  # fmt: skip


def recipe(kind: str, model: str = "llama", **keys: Any) -> dict[str, Any]:
    found = suite.recipe(model)
    optimizer = {"kind": kind, "groups": GROUPS, **keys}
    stage = {"kind": "pretrain", "steps": 3, "batch": BATCH, "optimizer": optimizer}
    if kind in FUSED:
        stage |= {"batch": {**BATCH, "micro_batch": 8}, "engine": {"max_grad_norm": 0.0}}
    return {**found, "stages": [stage]}


def check(
    ranks: RankPool,
    of: dict[str, Any],
    layout: str,
    precision: str = "fp64",
    *,
    whole: bool = True,
) -> None:
    verifier = Verifier(of, ranks, whole=whole)
    try:
        verdict = verifier.check("pretrain", layout, precision)
    finally:
        verifier.close()
    assert verdict.passed, verdict.sentence()


@pytest.mark.parametrize("kind", daily(DAILY, 1))
def test_a_layout_is_one_process(kind: str, ranks: RankPool) -> None:
    check(ranks, recipe(kind), DAILY[kind], whole=kind in RESUMED)


@pytest.mark.slow
@pytest.mark.parametrize("model", suite.MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", DAILY)
def test_every_layout_is_one_process(kind: str, layout: str, model: str, ranks: RankPool) -> None:
    if kind in FUSED and "pp" in layout:
        pytest.skip("refused: tests/parallel/test_feasible.py")
    check(ranks, recipe(kind, model), layout)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", DAILY)
def test_working_precisions(kind: str, precision: str, ranks: RankPool) -> None:
    if kind in FUSED and precision == "fp16":
        pytest.skip("refused: tests/parallel/test_feasible.py")
    layouts = ("dp2.zero3.tp2", "dp2.zero1" if kind in FUSED else "dp2.zero2.pp2.1f1b")
    for layout in layouts:
        check(ranks, recipe(kind), layout, precision)
