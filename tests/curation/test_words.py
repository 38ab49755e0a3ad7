"""Normal forms, shingles and distances, against their definitions."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.curation.near import NearIndex
from shardwise.curation.words import (
    distance,
    edit_distance,
    jaccard,
    ngrams,
    normal,
    shingles,
    tokens,
    words,
)

SETS = st.frozensets(st.integers(0, 12), max_size=8)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is 2+2 ?", ["what", "is", "2", "+", "2", "?"]),
        ("  Straße\n\tSTRASSE", ["strasse", "strasse"]),
        ("ﬁt \uff12", ["fit", "2"]),
        ("数学は x", ["数", "学", "は", "x"]),
        ("", []),
    ],
)
def test_tokens(text: str, found: list[str]) -> None:
    assert tokens(text) == found


def test_words_have_no_symbols() -> None:
    assert words("If a_1 + b = 3, then: _") == ["if", "a_1", "b", "3", "then", "_"]


@given(st.text())
def test_a_normal_form_is_its_own(text: str) -> None:
    assert normal(normal(text)) == normal(text)


def test_symbols_count_and_spaces_do_not() -> None:
    assert normal("2+2") == normal("2 +  2") != normal("2-2")


def test_short_texts_have_a_shingle_and_no_ngram() -> None:
    assert len(shingles(["a", "b"], 3)) == 1
    assert len(shingles(list("abcd"), 3)) == 2
    assert not shingles([], 3)
    assert not ngrams(["a", "b"], 3)
    assert len(ngrams(list("abcd"), 3)) == 2
    assert shingles(["a"], 3, "prompt").isdisjoint(shingles(["a"], 3, "answer"))


@functools.cache
def levenshtein(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        levenshtein(a[1:], b) + 1,
        levenshtein(a, b[1:]) + 1,
        levenshtein(a[1:], b[1:]) + (a[0] != b[0]),
    )


@given(st.text("abc", max_size=9), st.text("abc", max_size=9))
def test_edit_distance_is_levenshteins(a: str, b: str) -> None:
    assert edit_distance(a, b) == levenshtein(a, b)


def test_edit_distance_over_many_bits() -> None:
    a = list(range(500))
    b = [*a[:100], -1, *a[101:300], *a[310:], -1, -1]
    assert edit_distance(a, b) == edit_distance(b, a) == 1 + 10 + 2


def test_distances_are_shares() -> None:
    assert distance([], []) == 0.0
    assert distance(["a"], []) == 1.0
    assert distance(list("abcd"), list("abxd")) == 0.25
    assert jaccard(frozenset(), frozenset()) == 1.0
    assert jaccard(frozenset({1, 2}), frozenset({2, 3})) == pytest.approx(1 / 3)


@given(st.lists(st.tuples(SETS, SETS), max_size=12), st.tuples(SETS, SETS), st.floats(0.05, 1.0))
def test_the_index_finds_what_a_look_at_every_pair_finds(
    kept: list[tuple[frozenset[int], frozenset[int]]],
    asked: tuple[frozenset[int], frozenset[int]],
    threshold: float,
) -> None:
    def apart(parts: tuple[frozenset[int], ...]) -> tuple[frozenset[int], ...]:
        return tuple(frozenset(100 * i + s for s in part) for i, part in enumerate(parts))

    sets = [apart(parts) for parts in kept if any(parts)]
    probe = apart(asked)
    index = NearIndex(Counter(s for parts in sets for s in frozenset().union(*parts)), threshold)
    for i, parts in enumerate(sets):
        index.add(i, parts)
    near = {
        i for i, parts in enumerate(sets)
        if any(probe) and all(jaccard(a, b) >= threshold for a, b in zip(parts, probe))
    }  # fmt: skip
    assert set(index.near(probe)) == near


@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_pair_exactly_at_the_threshold_is_near(tenths: int) -> None:
    """Where 0.7 * 10 is a hair above 7, a prefix must not lose its last element."""
    index = NearIndex({}, tenths / 10)
    index.add(0, (frozenset(range(10)),))
    assert list(index.near((frozenset(range(10 - tenths, 10)),))) == [0]
