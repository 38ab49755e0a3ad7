"""Verify verified: every planted bug is caught, and named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardwise.verify import suite
from shardwise.verify.compare import disagreements
from shardwise.verify.run import Verifier, world_of
from tests.support.pool import RankPool
from tests.verify.bugs import BUGS, replay_with

# What the first differing value must be, for bugs that a careless check would see too late.
FIRST = {
    "initial_weights_drawn_by_local_shape": "initial",
    "ring_gradient_by_each_blocks_own_softmax": "gradient",
    "clipping_by_a_local_norm": "clip norm",
    "reference_that_is_another_model": "initial",
    "loss_counted_on_every_tensor_rank": "loss",
    "generator_with_stale_weights": "generated",
}


@pytest.fixture(scope="module")
def verifiers(ranks: RankPool) -> Iterator[dict[str, Verifier]]:
    layouts = sorted({b.layout for b in BUGS.values()})
    yield {m: Verifier(suite.recipe(m), [*layouts, "dp1.zero0"], ranks) for m in suite.MODELS}


@pytest.mark.parametrize(
    "model,stage,layout", sorted({(b.model, b.stage, b.layout) for b in BUGS.values()})
)
def test_without_a_bug_nothing_is_flagged(
    verifiers: dict[str, Verifier], model: str, stage: str, layout: str
) -> None:
    verdict = verifiers[model].check(stage, layout)
    assert verdict.passed, verdict.sentence()


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, verifiers: dict[str, Verifier], ranks: RankPool) -> None:
    bug = BUGS[name]
    verifier = verifiers[bug.model]
    trace = verifier.trace(bug.stage)
    found = ranks.run(replay_with, name, trace, bug.layout, world=world_of(bug.layout))
    wrong = [d for d in verifier.judge(bug.stage, bug.layout, "fp64", found) if d.is_bug]
    assert wrong or disagreements(found)
    if name in FIRST:
        assert wrong[0].kind.startswith(FIRST[name])


def test_there_are_enough_kinds() -> None:
    assert len(BUGS) >= 20
