"""Where a difference begins: no module of a sound layout differs, and a wrong one is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shardwise.verify import suite
from shardwise.verify.compare import origin
from shardwise.verify.notes import Reference
from shardwise.verify.verifier import SINGLE, Verifier
from shardwise.verify.walk import walk
from tests.support.pool import RankPool
from tests.verify.bugs import walk_with


class PlantedPool(RankPool):
    """The ranks of another pool, with a bug of `bugs` in those of a layout."""

    def __init__(self, ranks: RankPool) -> None:
        self.ranks, self.bug = ranks, ""

    def run(self, fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        if fn is walk and self.bug and not args[0].oracle:
            fn, args = walk_with, (self.bug, *args)
        return self.ranks.run(fn, *args, **options)


@pytest.fixture(scope="module")
def pool(ranks: RankPool) -> PlantedPool:
    return PlantedPool(ranks)


@pytest.fixture(scope="module")
def verifier(pool: PlantedPool) -> Iterator[Verifier]:
    made = Verifier(suite.recipe("llama"), pool)
    yield made
    made.close()


SOUND = [("pretrain", x) for x in ("tp4", "dp2.zero3.tp2.sp", "cp2.ring", "pp2.zbv")]
SOUND += [("sft", x) for x in ("tp2.sp", "cp2.ring")]


@pytest.mark.slow
@pytest.mark.parametrize("stage,layout", [*SOUND, ("reward", "tp2.sp")])
def test_a_sound_layout_differs_nowhere(verifier: Verifier, stage: str, layout: str) -> None:
    small = verifier.small(stage, layout)
    options: dict[str, Any] = {
        "given": verifier.oracle(small, "fp64").given,
        "probe": "update 1",
        "whole": False,
    }
    record = verifier.folder / f"{layout}.safetensors"
    task = dataclasses.replace(verifier.task(small, SINGLE, "fp64"), oracle=True, reference=None)
    verifier._walk(dataclasses.replace(task, record=record, **options))
    task = verifier.task(small, layout, "fp64")
    found = verifier._walk(dataclasses.replace(task, reference=record, **options))
    reference = Reference(record)
    looked_at = {n for r in found for n in r.found if n.startswith("output")}
    assert {n.partition("/")[0] for n in looked_at} == {"output", "output gradient"}
    assert len(looked_at) > 100
    assert stage == "reward" or any(" head sample " in name for name in looked_at)
    assert origin(reference, found) == ""


@pytest.mark.parametrize(
    "bug,layout,words",
    [
        pytest.param(
            *("foreign_vocabulary_not_masked", "tp2", "output of update 1 embed sample"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("ring_without_rescaling", "cp2.ring", "output of update 1 layers.0.attn.o sample"),
            marks=pytest.mark.slow,
        ),
        ("mean_over_data_ranks", "dp2.zero2", "its sum came last out of reduce_scatter over shard"),
    ],
)
def test_a_wrong_module_or_sum_is_named(
    verifier: Verifier, pool: PlantedPool, bug: str, layout: str, words: str
) -> None:
    pool.bug = bug
    try:
        verdict = verifier.check("pretrain", layout)
    finally:
        pool.bug = ""
    assert not verdict.passed and words in verdict.where, verdict.sentence()
    assert verdict.suspect.startswith(layout[:2])
