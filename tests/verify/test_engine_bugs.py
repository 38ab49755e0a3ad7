"""The judge is judged: what goes wrong in other engines is caught, and named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from shardwise.verify.verdict import Verdict
from shardwise.verify.verifier import Verifier
from shardwise.verify.walk import walk
from tests.support.pool import RankPool
from tests.verify import megatron_bugs
from tests.verify.edits import Edit, run_edited
from tests.verify.engine_bugs import BUGS, EngineBug

assert megatron_bugs.BUGS is BUGS
DAILY = ("the_norm_leaves_out_a_group",)


def edited(edits: tuple[Edit, ...], fn: Callable[..., Any], *args: Any) -> Any:
    """In a rank: `run_edited`, of a library that asks at its import where it is."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return run_edited(edits, fn, *args)


class Planted(RankPool):
    """Ranks of another pool; those of a layout run edits."""

    def __init__(self, ranks: RankPool) -> None:
        self.ranks, self.edits = ranks, tuple[Edit, ...]()

    def run(self, fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        if fn is walk and not args[0].oracle and self.edits:
            fn, args = edited, (self.edits, fn, *args)
        return self.ranks.run(fn, *args, **options)


@pytest.fixture(scope="module")
def planted(ranks: RankPool) -> Iterator[Callable[..., Verdict]]:
    pool, made = Planted(ranks), dict[str, Verifier]()

    def check(bug: EngineBug, *, clean: bool = False) -> Verdict:
        recipe = bug.recipe()
        key = f"{recipe} {bug.whole}"
        verifier = made.setdefault(key, Verifier(recipe, pool, bug.whole))
        pool.edits = () if clean else bug.edits
        return verifier.check("pretrain", bug.layout, bug.precision)

    yield check
    for verifier in made.values():
        verifier.close()


def of_installed(names: Any) -> list[str]:
    return [name for name in names if find_spec(BUGS[name].engine) is not None]


@pytest.mark.parametrize("name", of_installed(DAILY))
def test_one_of_some_kinds_is_caught_and_named(name: str, planted: Callable[..., Verdict]) -> None:
    said = planted(BUGS[name])
    assert not said.passed and BUGS[name].is_named_in(said.sentence()), said.sentence()


@pytest.mark.slow
@pytest.mark.parametrize("name", of_installed(n for n in BUGS if n not in DAILY))
def test_every_one_is_caught_and_named(name: str, planted: Callable[..., Verdict]) -> None:
    said = planted(BUGS[name])
    assert "EditError" not in said.problem, said.problem
    assert not said.passed and BUGS[name].is_named_in(said.sentence()), said.sentence()


@pytest.mark.slow
@pytest.mark.parametrize("name", of_installed(BUGS))
def test_without_the_edit_nothing_is_flagged(name: str, planted: Callable[..., Verdict]) -> None:
    verdict = planted(BUGS[name], clean=True)
    assert verdict.passed, verdict.sentence()
