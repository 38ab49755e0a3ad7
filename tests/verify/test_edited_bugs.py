"""Verify verified by edits of the source: every planted bug is caught, and named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shardwise.verify.pool import RankError
from shardwise.verify.roles import world_of
from shardwise.verify.verdict import Verdict
from shardwise.verify.verifier import Verifier
from shardwise.verify.walk import walk
from tests.support.pool import RankPool
from tests.verify.edited_bugs import BUGS, EditedBug
from tests.verify.edited_company_bugs import COMPANY_BUGS
from tests.verify.edited_extreme_bugs import EXTREME_BUGS
from tests.verify.edited_family_bugs import FAMILY_BUGS
from tests.verify.edited_more_bugs import MORE_BUGS
from tests.verify.edited_path_bugs import PATH_BUGS
from tests.verify.edited_reach_bugs import REACH_BUGS
from tests.verify.edits import Edit, applied, fit, run_edited
from tests.verify.optimizer_bugs import OPTIMIZER_BUGS
from tests.verify.preference_bugs import PREFERENCE_BUGS
from tests.verify.shared_generator_bugs import SHARED_GENERATOR_BUGS
from tests.verify.teaching_bugs import TEACHING_BUGS
from tests.verify.tracker_bugs import TRACKER_BUGS

TABLES = (
    *(BUGS, PATH_BUGS, MORE_BUGS, EXTREME_BUGS, REACH_BUGS),
    *(FAMILY_BUGS, COMPANY_BUGS, TRACKER_BUGS, OPTIMIZER_BUGS, PREFERENCE_BUGS),
    TEACHING_BUGS,
    SHARED_GENERATOR_BUGS,
)
ALL = {name: bug for table in TABLES for name, bug in table.items()}
# Kinds that are near each other, of which one is caught daily; a kind in none stands for itself.
_NEAR = (
    {"evaluation", "rows of an evaluation", "validation"},
    {"aggregates of steps", "labels of steps", "places of steps", "scores of steps"},
    {"dealing of scores", "completions without a score"},
    {"weights sent rounded", "stale weights", "rollouts", "completions in flight"},
    {"stored rollouts", "advantages", "groups"},
    {"another role's adapter", "passes of another role", "roles"},
    {"logits far from zero", "logits of a frozen model", "scores far from zero", "soft caps"},
    {"blocks of a checkpoint", "a checkpoint opened whole", "resharding", "starting weights"},
    {"asynchronous save", "resume"},
    {"gradients that are no numbers", "overflows", "loss scale"},
    {"sums over micro-batches", "partial sums", "rounding in a step", "dtypes"},
    {"controllers", "learning rate"},
    {"compute copies", "averages of weights", "weights given whole"},
    {"buckets of a teacher", "counts of a divergence", "direction of a divergence"},
    {"words that a text lacks", "rows of a teacher", "temperature of a teacher"},
    {"sharding of a device", "several nodes"},
    {"two-digit layers", "pipeline split", "pipeline order"},
    {"rows of a micro-batch", "masks", "rows that are cut off"},
    {"blocks of quantised weights", "blocks of 8-bit moments", "blocks of initial weights"},
    {"fp8", "window of amaxes"},
)
KINDS = {bug.kind for bug in ALL.values()}


def kinds_near(kind: str) -> frozenset[str]:
    """A kind with those near it."""
    return frozenset(next((near for near in _NEAR if kind in near), {kind}))


DAILY = {  # the cheapest of each
    near: min(
        (name for name, bug in ALL.items() if bug.kind in near),
        key=lambda n: (ALL[n].stage in ("ppo", "grpo"), world_of(ALL[n].layout)),
    )
    for near in dict.fromkeys(kinds_near(bug.kind) for bug in ALL.values())
}
NAMED_RIGHTLY = 0.9  # of all bugs: the tensor or call, and the axis


class EditedPool(RankPool):
    """The ranks of another pool, of which those of a layout, of the oracle or both run edits."""

    def __init__(self, ranks: RankPool) -> None:
        self.ranks = ranks
        self.of_layout, self.of_oracle = tuple[Edit, ...](), tuple[Edit, ...]()

    def run(self, fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        if fn is walk:
            edits = self.of_oracle if args[0].oracle else self.of_layout
            fn, args = run_edited, (edits, fn, *args)
        return self.ranks.run(fn, *args, **options)


class Verifiers:
    """Verifiers by recipe, so that bugs of one recipe share what one process computes."""

    def __init__(self, ranks: RankPool) -> None:
        self.pool = EditedPool(ranks)
        self.made: dict[str, Verifier] = {}

    def of(self, bug: EditedBug, *, planted: bool) -> Verifier:
        """A verifier whose ranks have the bug from now on, or none."""
        self.pool.of_layout = bug.edits if planted else ()
        self.pool.of_oracle = self.pool.of_layout if bug.shared else ()
        recipe = bug.recipe()
        key = json.dumps([recipe, bug.resumes, repr(self.pool.of_oracle)])
        if key not in self.made:
            self.made[key] = Verifier(recipe, self.pool, whole=bug.resumes)
        return self.made[key]

    def check(self, bug: EditedBug, *, planted: bool = True) -> Verdict:
        """What verify says of the bug's layout, with the bug planted or without."""
        verdict = self.of(bug, planted=planted).check(bug.stage, bug.layout, bug.precision)
        assert "EditError" not in verdict.problem, verdict.problem
        return verdict

    def is_caught(self, bug: EditedBug) -> bool:
        """Whether anything differs with the bug planted; where it begins is not looked for."""
        verifier = self.of(bug, planted=True)
        small = verifier.small(bug.stage, bug.layout)
        outcome = verifier.outcome(small, bug.layout, bug.precision)
        assert not isinstance(outcome.error, RankError) or outcome.error.cause != "EditError"
        return outcome.failed


@pytest.fixture(scope="module")
def verifiers(ranks: RankPool) -> Iterator[Verifiers]:
    found = Verifiers(ranks)
    yield found
    for verifier in found.made.values():
        verifier.close()


@pytest.mark.parametrize("name", ALL)
def test_every_edit_fits_the_source(name: str) -> None:
    fit(ALL[name].edits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_what_an_edit_changes_lives(name: str) -> None:
    with applied(ALL[name].edits) as changed:
        assert changed


def test_there_are_enough_kinds() -> None:
    assert len(ALL) == sum(map(len, TABLES)) >= 70
    assert len(DAILY) >= 60 and frozenset().union(*DAILY) == KINDS
    assert sum(map(len, DAILY)) == len(KINDS)  # none twice, and none that is no longer a kind
    assert sum(bug.blind for bug in ALL.values()) >= 10


@pytest.mark.parametrize("name", DAILY.values())
def test_one_of_each_kind_is_caught(name: str, verifiers: Verifiers) -> None:
    assert verifiers.is_caught(ALL[name])


@pytest.mark.slow
def test_the_others_are_caught_and_nine_of_ten_named_rightly(verifiers: Verifiers) -> None:
    said = {name: verifiers.check(bug) for name, bug in ALL.items()}
    assert not [name for name, verdict in said.items() if verdict.passed]
    wrong = {n: v.sentence() for n, v in said.items() if not ALL[n].is_named_in(v.sentence())}
    assert len(wrong) <= (1 - NAMED_RIGHTLY) * len(ALL), wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_without_the_edit_nothing_is_flagged(name: str, verifiers: Verifiers) -> None:
    verdict = verifiers.check(ALL[name], planted=False)
    assert verdict.passed, verdict.sentence()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, bug in ALL.items() if not bug.shared])
def test_no_edit_changes_what_one_process_computes(
    name: str, verifiers: Verifiers, ranks: RankPool
) -> None:
    """Else the mistake would be in both, and not one of a layout."""
    bug, pool = ALL[name], EditedPool(ranks)
    pool.of_oracle = bug.edits
    edited = Verifier(bug.recipe(), pool, whole=bug.resumes)
    values = []
    for verifier in (verifiers.of(bug, planted=False), edited):
        oracle = verifier.oracle(verifier.small(bug.stage, bug.layout), "fp64", bug.layout)
        values.append(oracle.exact.values)
    edited.close()
    assert values[0].keys() == values[1].keys()
    assert all(value.equal(values[1][name]) for name, value in values[0].items())
