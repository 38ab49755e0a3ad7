"""Adapters, and a base in few bits below them, by the whole path of verify; planted bugs in both:
all are caught."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from shardwise.config.adapters import FreezeConfig
from shardwise.verify import suite
from shardwise.verify.pool import RankError
from shardwise.verify.roles import world_of
from shardwise.verify.verifier import Verifier
from tests.adapters.support import adapter, plain, train, train_native, worst
from tests.support import toy
from tests.support.pool import RankPool
from tests.verify import adapter_bugs, quant_bugs
from tests.verify.adapter_bugs import AdapterBug
from tests.verify.edits import fit, run_edited

CASES: dict[str, tuple[Any, Any]] = {
    "lora": (toy.llama(), adapter(dropout=0.2)),
    "dora": (toy.llama(), adapter("dora", init="pissa", rslora=True, dropout=0.2)),
    "shared head": (toy.llama(num_kv_heads=1), adapter("dora", init="orthogonal", targets=["k"])),
    "two shared heads": (toy.llama(num_layers=1), adapter("dora", targets=["k"])),
    "last layer": (toy.llama(), FreezeConfig(train_last=1)),
    "sequential": (toy.llama(), adapter("bottleneck", size=6)),
    "parallel": (toy.llama(), adapter("bottleneck", placement="parallel", size=6)),
    "nf4": (toy.llama(), adapter(quantise="nf4")),
    "int8": (toy.llama(), adapter("dora", quantise="int8")),
    "wide": (toy.llama(hidden_size=128, ffn_size=192, num_layers=1), adapter(quantise="nf4")),
}
BUGS = {**adapter_bugs.BUGS, **quant_bugs.BUGS}
BY_KIND = {bug.kind: name for name, bug in reversed(BUGS.items())}


@functools.cache
def wanted(case: str) -> dict[str, torch.Tensor]:
    return train(plain(*CASES[case]))


def is_caught(ranks: RankPool, bug: AdapterBug, *, planted: bool = True) -> bool:
    edits = bug.edits if planted else ()
    args = (edits, train_native, *CASES[bug.case], bug.layout, 2)
    try:
        found = ranks.run(run_edited, *args, world=world_of(bug.layout))
    except RankError as error:
        assert error.cause != "EditError", error
        return True
    one = wanted(bug.case)
    return any(f.keys() != one.keys() or worst(f, one)[0] > 1e-9 for f in found)


@pytest.mark.parametrize("name", BUGS)
def test_every_edit_fits_the_source(name: str) -> None:
    fit(BUGS[name].edits)


@pytest.mark.parametrize("name", sorted(BY_KIND.values()))
def test_one_bug_of_each_kind_is_caught(ranks: RankPool, name: str) -> None:
    assert is_caught(ranks, BUGS[name])


@pytest.mark.slow
def test_every_bug_is_caught_and_nothing_without_one(ranks: RankPool) -> None:
    assert [name for name, bug in BUGS.items() if not is_caught(ranks, bug)] == []
    places = {(bug.case, bug.layout): bug for bug in BUGS.values()}
    assert not any(is_caught(ranks, bug, planted=False) for bug in places.values())


def check(
    ranks: RankPool,
    stage: str,
    asked: dict[str, Any],
    *layouts: str,
    precision: str = "fp64",
    **how: Any,
) -> None:
    """Each layout of a stage of the suite with something of its own to train."""
    recipe = suite.recipe("llama-untied-odd")
    recipe["stages"] = [s | asked for s in recipe["stages"] if s["kind"] == stage]
    verifier = Verifier(recipe, ranks, **how)
    try:
        for layout in layouts:
            verdict = verifier.check(stage, layout, precision)
            if not verdict.passed:
                pytest.fail(f"{layout}: {verdict.sentence()}", pytrace=False)
        if how.get("whole"):
            verdict = verifier.check_splits(stage)
            assert verdict.passed, verdict.sentence()
    finally:
        verifier.close()


LORA = {"adapter": {"kind": "lora", "rank": 8, "dropout": 0.1, "targets": ["all-linear", "head"]}}
DORA = {"adapter": {"kind": "dora", "rank": 8, "init": "pissa"}}
SERIES = {"adapter": {"kind": "bottleneck"}}
BESIDE = {"adapter": {"kind": "bottleneck", "placement": "parallel", "activation": "gelu"}}
NAMES = ["lora", "dora", "sequential", "parallel"]


@pytest.mark.slow
def test_verify_knows_a_reference_on_the_actors_base(ranks: RankPool) -> None:
    check(ranks, "grpo", DORA, "tp2.sp")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft", "grpo"])
@pytest.mark.parametrize("asked", [LORA, DORA, SERIES, BESIDE], ids=NAMES)
def test_verify_passes_on_every_axis(ranks: RankPool, stage: str, asked: dict[str, Any]) -> None:
    layouts = ("tp2.sp", "dp2.zero3", "pp2.1f1b", "cp2.ring", "dp2.zero3.tp2.sp")
    check(ranks, stage, asked, *layouts, whole=True)


# A unit at the kink of a ReLU is on or off as bf16 has it, and takes its bias's gradient along.
SMOOTH = {"adapter": {"kind": "bottleneck", "activation": "gelu"}}


@pytest.mark.slow
@pytest.mark.parametrize("asked", [LORA, DORA, SMOOTH, BESIDE], ids=NAMES)
def test_verify_passes_in_bf16(ranks: RankPool, asked: dict[str, Any]) -> None:
    check(ranks, "sft", asked, "tp2", "dp2.zero3", precision="bf16")
