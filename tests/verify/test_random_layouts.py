"""No false alarm: 300 random recipes on random layouts, each computed rightly, none is flagged."""

from __future__ import annotations

from collections import Counter

import pytest

from shardwise.models.families import FAMILIES
from shardwise.parallel.layout import CP_KINDS, SCHEDULES
from shardwise.verify.roles import layouts_of
from shardwise.verify.verifier import Verifier
from tests.support.pool import RankPool
from tests.verify.random_cases import PRECISIONS, STAGES, draw

COUNT = 300
DAILY = {205, 242}  # cheap ones
CASES = [
    pytest.param(index, marks=[] if index in DAILY else [pytest.mark.slow])
    for index in range(COUNT)
]


@pytest.mark.parametrize("index", CASES)
def test_random_layout_is_not_flagged(index: int, ranks: RankPool) -> None:
    case = draw(index)
    verifier = Verifier(case.recipe, ranks, case.whole)
    try:
        verdicts = [verifier.check(case.stage, case.layout, case.precision)]
        if case.whole and "fp8" not in case.recipe["engine"]:
            verdicts.append(verifier.check_splits(case.stage, case.layout))
    finally:
        verifier.close()
    for verdict in verdicts:
        assert verdict.passed, f"{case}: {verdict.sentence()}"


def test_what_is_drawn_holds_all_that_there_is() -> None:
    cases = [draw(index) for index in range(COUNT)]
    layouts = [layout for case in cases for layout in layouts_of(case.layout)]
    assert {case.recipe["model"]["family"] for case in cases} == set(FAMILIES)
    found = Counter((case.stage, case.precision) for case in cases)
    assert len(found) == len(set(STAGES)) * len(PRECISIONS) and min(found.values()) >= 9
    assert {x.schedule for x in layouts if x.pp > 1} == set(SCHEDULES)
    assert {x.cp_kind for x in layouts if x.cp > 1} == set(CP_KINDS)
    assert {x.zero for x in layouts if x.dp > 1} == {0, 1, 2, 3}
    assert any("=" in case.layout for case in cases)
    assert {2, 3} <= {getattr(x, axis) for x in layouts for axis in ("dp", "tp", "pp", "cp")}
    assert {"delayed", "current", "mxfp8"} == {
        case.recipe["engine"]["fp8"]["recipe"] for case in cases if "fp8" in case.recipe["engine"]
    }
