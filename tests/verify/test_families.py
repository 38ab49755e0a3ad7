"""Every family on every kind of layout; each day those whose switches a layout cuts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardwise.models.families import FAMILIES
from shardwise.verify import suite
from shardwise.verify.verifier import Verifier
from tests.support.families import SMALL, small
from tests.support.pool import RankPool

LAYOUTS = ("tp2.sp", "tp4", "pp2.1f1b", "pp2.zbv", "cp2.ring", "cp2.ulysses", "dp2.zero3")
DAILY = {
    ("gemma2", "tp2.sp"),  # norms around branches, a cut head's soft cap
    ("smollm3", "pp2.1f1b"),  # layers without rotation
    ("granite_swa", "tp2.sp"),  # sinks of cut heads
    ("ministral3", "cp2.ring"),  # queries that grow with their positions
    ("cohere", "tp2.sp"),  # two branches out of one norm, pairs of neighbours
    ("glm4", "cp2.ring"),  # pairs of neighbours, of a part of a head
    ("nemotron", "tp2.sp"),  # squared ReLU of cut features, layer norms of 1 + weight
}
CASES = [
    pytest.param(f, x, marks=[] if (f, x) in DAILY else [pytest.mark.slow])
    for f in SMALL
    for x in LAYOUTS
]


@pytest.fixture(scope="module")
def verifiers(ranks: RankPool) -> Iterator[dict[str, Verifier]]:
    made = {
        family: Verifier(suite.recipe("llama") | {"model": small(family)}, ranks)
        for family in SMALL
    }
    yield made
    for verifier in made.values():
        verifier.close()


def test_every_family_is_small_somewhere() -> None:
    assert set(SMALL) == set(FAMILIES)


@pytest.mark.parametrize("family,layout", CASES)
def test_layout(verifiers: dict[str, Verifier], family: str, layout: str) -> None:
    verdict = verifiers[family].check("pretrain", layout)
    assert verdict.passed, verdict.sentence()
    assert not verdict.given_up


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_a_layout_rounds_where_one_process_does(
    verifiers: dict[str, Verifier], family: str
) -> None:
    verdict = verifiers[family].check("pretrain", "tp2.sp", "bf16")
    assert verdict.passed, verdict.sentence()
