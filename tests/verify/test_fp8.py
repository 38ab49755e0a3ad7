"""FP8 under verify: sound layouts pass with bitwise equal scales, every planted bug is caught."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from shardwise.verify import suite
from shardwise.verify.roles import world_of
from shardwise.verify.verifier import Verifier
from shardwise.verify.walk import walk
from tests.support.daily import daily
from tests.support.pool import RankPool
from tests.verify.fp8_bugs import BUGS, walk_with

RECIPES = ("delayed", "current", "block", "mxfp8")
# One of each axis for each recipe; all of them together are slow.
FAST = {
    "delayed": ("dp2.zero2", "tp2.sp", "pp2.zbv"),
    "current": ("dp2.zero3", "tp2.sp", "pp2.1f1b"),
    "block": ("dp2.zero1", "tp2.sp"),
    "mxfp8": ("dp2.zero2", "tp2.sp", "pp2.zbv"),
}
MANY = (
    "dp2.zero0",
    "tp2",
    "dp4.hsdp2.zero3",
    "tp4.sp",
    "pp2.gpipe",
    "pp2.interleavedzb.v2",
    "pp2.dualpipev",
    "dp2.zero2.tp2.sp",
    "dp2.zero3.pp2.zbv",
    "tp2.sp.pp2.1f1b",
    "dp2.zero3.tp2.sp.pp2.zbv",
    "cp2.ring",
    "tp2.sp.cp2.ulysses",
)
# What the first differing value must be.
FIRST = {
    "amax_not_reduced_over_data_ranks": "history",
    "amax_reduced_over_the_wrong_group": "history",
    "scale_never_updated": "history",
    "amax_of_another_ranks_weight": "amax",
}


BATCH = {"global_batch": 16, "micro_batch": 2, "seq_len": 32}


def recipe(name: str, **fp8: Any) -> dict[str, Any]:
    """Three or four layers, of which the inner are quantised; a window of two steps."""
    model = suite.MODELS["llama"] | {"num_layers": 3, "num_heads": 4, "num_kv_heads": 4}
    if name in ("delayed", "mxfp8"):
        model |= {"num_layers": 4, "num_kv_heads": 2}
    stage = {"kind": "pretrain", "steps": 3, "batch": BATCH}
    engine = {"compile": False, "precision": "bf16"}
    engine["fp8"] = {"recipe": name, "amax_history_len": 2, **fp8}
    return {"name": "fp8", "seed": 7, "model": model, "engine": engine, "stages": [stage]}


EVERY = daily([(r, x) for r, all_ in FAST.items() for x in all_], 1, 8)


@pytest.fixture(scope="module")
def verifiers(ranks: RankPool) -> Iterator[dict[str, Verifier]]:
    made = {r: Verifier(recipe(r), ranks) for r in RECIPES}
    yield made
    for verifier in made.values():
        verifier.close()


@pytest.mark.parametrize("name,layout", EVERY)
def test_layouts_scale_as_one_process_with_their_domains(
    name: str, layout: str, verifiers: dict[str, Verifier]
) -> None:
    verdict = verifiers[name].check("pretrain", layout)
    assert verdict.passed, verdict.sentence()
    assert verdict.worst["amax"] == verdict.worst["scale"] == 0.0
    assert "sentinel" in verdict.worst and ("history" in verdict.worst) == (name == "delayed")


@pytest.mark.parametrize("layout", daily(["dp2.zero2", "pp2.1f1b"], 0))
def test_stages_that_write_their_own_batches_scale_alike(layout: str, ranks: RankPool) -> None:
    """Each micro-batch is a scaling domain: a layout must not be given larger ones."""
    rl = recipe("current")
    rl["stages"] = [suite.STAGES["grpo"] | {"updates_per_rollout": 1, "samples_per_prompt": 2}]
    verifier = Verifier(rl, ranks)
    verdict = verifier.check("grpo", layout)
    verifier.close()
    assert verdict.passed, verdict.sentence()
    assert verdict.worst["amax"] == verdict.worst["scale"] == 0.0
    assert "sentinel" in verdict.worst


@pytest.mark.slow
def test_each_role_scales_in_its_own_domains(ranks: RankPool) -> None:
    rl = recipe("current")
    rl["stages"] = [suite.STAGES["ppo"] | {"reward_model_weight": 0.0, "samples_per_prompt": 2}]
    verifier = Verifier(rl, ranks)
    verdict = verifier.check("ppo", "actor=tp2,critic=dp2.zero2")
    verifier.close()
    assert verdict.passed, verdict.sentence()
    assert verdict.worst["amax"] == verdict.worst["scale"] == 0.0


@pytest.mark.parametrize("name,layout", daily([("delayed", "dp2.zero2"), ("block", "tp2.sp")], 0))
def test_layouts_stay_within_the_bound_of_bf16(
    name: str, layout: str, verifiers: dict[str, Verifier]
) -> None:
    verdict = verifiers[name].check("pretrain", layout, "bf16")
    assert verdict.passed, verdict.sentence()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_many_layouts(name: str, ranks: RankPool) -> None:
    deep = recipe(name)
    deep["model"]["num_layers"] = 4  # two chunks a rank
    judge = Verifier(deep, ranks)
    for layout in MANY:
        for precision in ("fp64", "bf16"):
            verdict = judge.check("pretrain", layout, precision)
            assert verdict.passed, f"{layout} {precision}: {verdict.sentence()}"


@pytest.mark.parametrize("name", daily(BUGS, *range(1, len(BUGS), 2)))
def test_planted_bug_is_caught(name: str, verifiers: dict[str, Verifier], ranks: RankPool) -> None:
    bug = BUGS[name]
    judge = verifiers[bug.recipe]
    small = judge.small("pretrain", bug.layout)
    task = judge.task(small, bug.layout, "fp64")
    found = ranks.run(walk_with, name, task, world=world_of(bug.layout))
    wrong = [d for d in judge.judge(small, bug.layout, "fp64", found) if d.is_bug]
    assert wrong
    if name in FIRST:
        assert wrong[0].kind == FIRST[name], wrong[0]


def test_another_layouts_domains_are_not_taken_for_ones_own(
    verifiers: dict[str, Verifier], ranks: RankPool
) -> None:
    """With one scale for a tensor, tp's scales differ from one process's: the reference matters."""
    judge = verifiers["current"]
    small = judge.small("pretrain", "tp2.sp")
    found = ranks.run(walk, judge.task(small, "tp2.sp", "fp64"), world=2)
    wrong = [d for d in judge.judge(small, "dp1.zero0", "fp64", found) if d.is_bug]
    assert wrong and wrong[0].kind == "amax"


def test_there_are_enough_kinds() -> None:
    assert len(BUGS) >= 12
