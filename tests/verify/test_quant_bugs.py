"""Planted bugs in a quantised base: all are caught."""

from __future__ import annotations

import pytest

from tests.adapters.support import adapter
from tests.support import toy
from tests.support.pool import RankPool
from tests.verify.quant_bugs import BUGS, BY_KIND
from tests.verify.test_adapter_bugs import CASES, is_caught

CASES |= {
    "nf4": (toy.llama(), adapter(quantise="nf4")),
    "int8": (toy.llama(), adapter("dora", quantise="int8")),
    "wide": (toy.llama(hidden_size=128, ffn_size=192, num_layers=1), adapter(quantise="nf4")),
}


@pytest.mark.parametrize("name", sorted(BY_KIND.values()))
def test_one_bug_of_each_kind_is_caught(ranks: RankPool, name: str) -> None:
    assert is_caught(ranks, BUGS[name])


@pytest.mark.slow
def test_every_bug_is_caught_and_nothing_without_one(ranks: RankPool) -> None:
    assert [name for name, bug in BUGS.items() if not is_caught(ranks, bug)] == []
    places = {(bug.case, bug.layout): bug for bug in BUGS.values()}
    assert not any(is_caught(ranks, bug, planted=False) for bug in places.values())
