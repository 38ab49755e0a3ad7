"""What every filter promises, on rows of all sorts; and bugs that these promises catch."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shardwise.curation import FilterRules, HeldOut, Row, filter_rows, filtering, set_rules
from shardwise.curation import row_rules as row_rules_module
from shardwise.curation.filtering import Filtered, judge_rows, judge_set, table
from shardwise.curation.row_rules import RowRules
from shardwise.curation.words import distance, jaccard, normal, shingles, tokens
from shardwise.errors import DataError, UserError
from tests.curation.support import held_out, row, rules

NAN = float("nan")
WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=6).map(" ".join)
SCORES = st.none() | st.sampled_from([0, 0.5, 1, True, NAN, "high"])
ROWS = st.lists(st.builds(row, WORDS, WORDS, SCORES), min_size=1, max_size=25)
THRESHOLD = {"kind": "threshold", "min": 0.5}
EXACT = {"kind": "duplicates"}
NEAR = {"kind": "duplicates", "near": 0.5, "shingle": 2}
APART = {"kind": "diversity", "min_distance": 0.4}
JACCARD = {"kind": "diversity", "measure": "jaccard", "min_distance": 0.4, "shingle": 2}
QUOTA = {"kind": "quota", "per_prompt": 2, "total": 9}
LENGTH = {"kind": "length", "unit": "words", "max": 5, "min": 2}
FORMAT = {"kind": "format", "template": "a{}"}
LANGUAGE = {"kind": "language", "language": "en"}
RULES = st.lists(
    st.sampled_from([THRESHOLD, EXACT, NEAR, APART, JACCARD, QUOTA, LENGTH, LANGUAGE]),
    min_size=1,
    max_size=5,
    unique_by=lambda r: r["kind"],
)
EXAM = held_out("a b c", "d d", ngram=4, answers=("a b c d a",))


def kept(
    rows: list[Row], config: FilterRules, exam: HeldOut | None = None, seed: int = 0
) -> list[Row]:
    """The rows that a filter keeps; none where it says that none is left."""
    try:
        return filter_rows(rows, config, exam, seed=seed).kept
    except DataError as error:
        assert "no row is left" in str(error)
        return []


def contents(rows: list[Row]) -> Counter[str]:
    return Counter(json.dumps(r.data) for r in rows)


@given(ROWS, RULES)
@settings(max_examples=100)
def test_filtering_twice_is_filtering_once(rows: list[Row], listed: list[dict[str, Any]]) -> None:
    config = rules(*listed, contamination={"on_overlap": "drop"})
    once = kept(rows, config, EXAM)
    assert not once or kept(once, config, EXAM) == once


@given(ROWS, RULES, st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_the_order_of_rows_and_of_rules_does_not_count(
    rows: list[Row], listed: list[dict[str, Any]], dice: random.Random
) -> None:
    drop = {"on_overlap": "drop"}
    found = kept(rows, rules(*listed, contamination=drop), EXAM)
    dice.shuffle(listed)
    shuffled = dice.sample(rows, len(rows))
    again = kept(shuffled, rules(*listed, contamination=drop), EXAM)
    assert contents(again) == contents(found)
    positions = [rows.index(r) for r in found if rows.count(r) == 1]
    assert positions == sorted(positions)  # what is kept stands as it came


@given(ROWS, st.integers(0, 2**63 - 1))
@settings(max_examples=100)
def test_no_survivor_breaks_a_rule(rows: list[Row], seed: int) -> None:
    config = rules(THRESHOLD, NEAR, APART, QUOTA, LENGTH, contamination={"on_overlap": "drop"})
    found = kept(rows, config, EXAM, seed)
    per_prompt = Counter(normal(r.prompt) for r in found)
    assert max(per_prompt.values(), default=0) <= 2
    assert len(found) <= 9
    for i, r in enumerate(found):
        assert isinstance(r.data["score"], bool | int | float)
        assert r.data["score"] >= 0.5
        assert 2 <= len(r.answer.split()) <= 5
        assert r.prompt not in ("a b c", "d d")
        assert not any(run in f"{r.prompt} | {r.answer}" for run in ("a b c d", "b c d a"))
        for other in found[:i]:
            same = normal(r.prompt) == normal(other.prompt)
            assert not same or distance(tokens(r.answer), tokens(other.answer)) >= 0.4
            pairs = [(r.prompt, other.prompt), (r.answer, other.answer)]
            alike = [jaccard(shingles(a.split(), 2), shingles(b.split(), 2)) for a, b in pairs]
            assert min(alike) < 0.5


@given(ROWS, st.permutations(["format", "length", "language", "threshold"]))
def test_rules_of_a_row_commute(rows: list[Row], order: list[str]) -> None:
    config = rules(FORMAT, LENGTH, LANGUAGE, THRESHOLD)
    with pytest.MonkeyPatch.context() as patch:
        expected = kept(rows, config)
        patch.setattr(filtering, "ROW_KINDS", tuple(order))
        assert kept(rows, config) == expected


@given(ROWS, st.integers(1, 7))
def test_rows_may_be_judged_in_parts(rows: list[Row], size: int) -> None:
    config = rules(THRESHOLD, LENGTH, contamination={"on_overlap": "drop"})
    with RowRules(config) as opened:
        whole = judge_rows(rows, opened, EXAM)
        parts = [
            v
            for i in range(0, len(rows), size)
            for v in judge_rows(rows[i : i + size], opened, EXAM)
        ]
    assert parts == whole


def test_planted_duplicates_are_found() -> None:
    dice = random.Random(0)
    vocabulary = [f"word{i}" for i in range(200)]
    originals = [" ".join(dice.choices(vocabulary, k=40)) for _ in range(150)]
    planted = []
    for text in originals[:60]:
        said = text.split()
        said[dice.randrange(40)] = "planted"
        planted.append(" ".join(said).upper())
    rows = [row(f"Question {i}?", t, score=1.0) for i, t in enumerate(originals)]
    rows += [row(f"question  {i} ?", t, score=0.0) for i, t in enumerate(planted)]
    dice.shuffle(rows)
    found = kept(rows, rules({"kind": "duplicates", "near": 0.7}))
    assert sorted(r.answer for r in found) == sorted(originals)
    assert len(kept(rows, rules(EXACT))) == len(rows)


def test_near_rows_have_near_prompts_and_near_answers() -> None:
    long = "count how often the letter a stands in the following list of letters a b c a"
    rows = [row(long, "three of them"), row(long, "two of them")]
    assert len(kept(rows, rules({"kind": "duplicates", "near": 0.6}))) == 2
    assert len(kept(rows, rules({"kind": "duplicates", "near": 0.6, "by": "prompt"}))) == 1


def test_other_sets_take_what_they_have(tmp_path: Any) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"messages": [
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "a b c d e f g h"}
    ]}) + "\n")  # fmt: skip
    against = [{"path": train}]
    rows = [
        row("one ?", "A B C D E F G H", score=1),
        row("One?", "a b c d e f g i", score=1),
        row("One?", "something else", score=0),
    ]
    exact = filter_rows(rows, rules({"kind": "duplicates", "against": against}))
    near = filter_rows(rows, rules({"kind": "duplicates", "against": against, "near": 0.6}))
    assert [v.why.split(" in ")[0] for v in exact.verdicts] == ["stands", "", ""]
    assert [v.why.split(" in ")[0] for v in near.verdicts] == ["stands", "nearly stands", ""]


def test_a_quota_takes_the_best_of_each_prompt() -> None:
    rows = [row(p, str(i), score=i, group=i % 2) for p in "xy" for i in range(5)]
    found = kept(rows, rules({"kind": "quota", "per_prompt": 2}))
    assert [(r.prompt, r.data["score"]) for r in found] == [("x", 3), ("x", 4), ("y", 3), ("y", 4)]
    by_group = kept(rows, rules({"kind": "quota", "per_prompt": 1, "field": "group"}))
    assert sorted(r.data["score"] for r in by_group) == [3, 4]
    assert [r.data["score"] for r in kept(rows, rules({"kind": "quota", "total": 3}))].count(4) == 2


def test_ties_of_a_quota_are_drawn_by_the_seed() -> None:
    rows = [row("x", str(i), score=1) for i in range(30)]
    quota = {"kind": "quota", "per_prompt": 3}
    drawn = {tuple(r.answer for r in kept(rows, rules(quota), seed=s)) for s in range(12)}
    assert len(drawn) > 8
    assert kept(rows, rules(quota), seed=1) == kept(rows, rules(quota), seed=1)


def test_lengths_are_of_what_is_asked_for() -> None:
    said = row("a prompt", "one two\n\nthree")
    for keys, fits in [
        ({"unit": "characters", "max": 14}, True),
        ({"unit": "characters", "max": 13}, False),
        ({"unit": "words", "min": 3}, True),
        ({"unit": "words", "min": 4}, False),
        ({"unit": "steps", "max": 2, "min": 2}, True),
        ({"unit": "words", "of": "row", "max": 5, "min": 5}, True),
        ({"unit": "words", "of": "prompt", "max": 2, "min": 2}, True),
        ({"unit": "tokens", "min": 7, "max": 7}, True),
    ]:
        config = rules({"kind": "length", **keys})
        with RowRules(config, lambda text: len(text) // 2) as opened:
            [verdict] = judge_rows([said], opened, held_out())
        assert (not verdict.rule) is fits, keys
    with pytest.raises(UserError, match="no tokenizer"):
        filter_rows([said], rules({"kind": "length", "unit": "tokens", "max": 3}))


def test_answers_are_verified_anew_and_scores_written() -> None:
    check = {"kind": "verifier", "write": "score",
             "reward": {"parts": [{"kind": "numeric"}]}}  # fmt: skip
    rows = [row("2 + 2?", f"It is {n}.", score=9, answer=4, id=n) for n in (3, 4)]
    rows.append(row("x?", "5", answer=["5", "6"], id=5))
    found = filter_rows(rows, rules(check))
    assert [v.why for v in found.verdicts] == ["earns 0, at least 1 allowed", "", ""]
    assert [(r.data["id"], r.data["score"]) for r in found.kept] == [(4, 1.0), (5, 1.0)]
    with pytest.raises(DataError, match="no field 'answer' to verify"):
        filter_rows([row("2 + 2?", "4")], rules(check))
    unscorable = filter_rows([*rows, row("x?", "5", answer="five")], rules(check))
    assert "the reference answer is not a number" in unscorable.verdicts[-1].why


def test_contamination_is_refused_and_counted() -> None:
    exam = held_out("What is 2+2?", "one two three four five six", ngram=4, answers=("g h i j k",))
    rows = [
        row("what is 2 + 2 ?", "4", where="a.jsonl: line 1"),
        row("zero one two three four", "x"),
        row("Fine?", "so: G, h, i, j!"),
        row("one two three", "x"),
    ]
    with pytest.raises(DataError, match=r"3 of 4 rows overlap .*a.jsonl: line 1: asks what exam: 0 "
                                        r"asks; .*on_overlap: drop"):  # fmt: skip
        filter_rows(rows, rules(EXACT), exam)
    dropped = filter_rows(rows, rules(EXACT, contamination={"on_overlap": "drop"}), exam)
    assert [v.why for v in dropped.verdicts] == [
        "asks what exam: 0 asks", "shares 1 runs of 4 words with exam: 1",
        "shares 1 runs of 4 words with exam: 0", "",
    ]  # fmt: skip
    assert dropped.report["rules"][0]["dropped"] == 3


def test_a_template_is_no_contamination() -> None:
    template = "please reason step by step and put your final answer in a box"
    exam = held_out(*(f"{template} number{i}" for i in range(11)), ngram=5)
    rows = [row(f"{template} mine", "x")]
    assert kept(rows, rules(EXACT), exam) == rows
    strict = held_out(*(f"{template} number{i}" for i in range(11)), ngram=5, common=0)
    with pytest.raises(DataError, match="1 of 1 rows overlap"):
        filter_rows(rows, rules(EXACT), strict)


def test_a_share_of_the_held_out_text_may_be_asked_for() -> None:
    text = "a b c d e f g h"
    rows = [row("x", "a b c d e y")]  # 2 of its 5 runs of 4 words
    drop = {"on_overlap": "drop"}
    assert not kept(rows, rules(EXACT, contamination=drop), held_out(text, ngram=4, share=0.4))
    assert kept(rows, rules(EXACT, contamination=drop), held_out(text, ngram=4, share=0.41))


def test_the_report_adds_up() -> None:
    rows = [row("x", "a", score=1), row("x", "A", score=0.6), row("y", "b", score=NAN),
            row("x", "c", score=0.8), row("z", "d", score=0.7)]  # fmt: skip
    found = filter_rows(rows, rules(QUOTA | {"per_prompt": 1}, EXACT, THRESHOLD))
    report = found.report
    assert [(r["rule"], r["seen"], r["dropped"]) for r in report["rules"]] == [
        ("threshold", 5, 1), ("contamination", 4, 0), ("duplicates", 4, 1), ("quota", 3, 1),
    ]  # fmt: skip
    assert report["rules"][0]["examples"] == [
        {"where": "", "why": "score is nan, no finite number", "prompt": "y", "answer": "b"}
    ]
    assert (report["rows"], report["kept"], report["prompts"], report["prompts_kept"]) == (
        5,
        2,
        3,
        2,
    )
    assert report["rows_of_a_prompt"] == {"1": 2}
    assert report["mean_score"] == pytest.approx(3.1 / 4)
    assert report["mean_score_kept"] == pytest.approx(0.85)
    json.dumps(report, allow_nan=False)
    assert table(report).splitlines()[-1] == "2 of 5 rows kept, of 2 of 3 prompts"


def test_an_empty_result_says_which_rule_and_what_to_loosen() -> None:
    rows = [row("x", "a b", score=0.2), row("y", "c", score=0.4)]
    with pytest.raises(DataError) as raised:
        filter_rows(rows, rules(THRESHOLD, EXACT))
    assert str(raised.value) == (
        "no row is left of 2; dropped by threshold 2. threshold dropped most (as score 0.2, at "
        "least 0.5 allowed): take a lower min or a higher max, or another field"
    )
    with pytest.raises(DataError, match="no rows to filter"):
        filter_rows([], rules(EXACT))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"kind": "length"}, "needs min, max or both"),
        ({"kind": "length", "min": 5, "max": 4}, "5 is more than max"),
        ({"kind": "threshold"}, "needs min, max or both"),
        ({"kind": "threshold", "min": NAN}, "finite"),
        ({"kind": "threshold", "min": 2.0, "max": 1.0}, "is more than max"),
        ({"kind": "quota"}, "needs per_prompt, total or both"),
        ({"kind": "quota", "per_prompt": 0}, "greater than or equal to 1"),
        ({"kind": "language", "language": "xx"}, "not known; known: ar"),
        ({"kind": "duplicates", "near": 0.0}, "greater than 0"),
        ({"kind": "verifier", "min": 1.0, "rewards": {}}, "rewards"),
        ({"kind": "best"}, "quota"),
    ],
)
def test_bad_rules_are_refused(rule: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        rules(rule)


# Planted bugs: each breaks what a test above promises.

DOUBLE = [row("x", "a", score=1), row("x", " A", score=1), row("x", "b", score=0.5)]
PAIR = [THRESHOLD, EXACT, {"kind": "quota", "per_prompt": 2}]


def answers(found: Filtered) -> list[str]:
    return [normal(r.answer) for r in found.kept]


def test_planted_quota_before_deduplication(monkeypatch: pytest.MonkeyPatch) -> None:
    """A duplicate takes the place of a row that says something else."""
    assert answers(filter_rows(DOUBLE, rules(*PAIR))) == ["a", "b"]
    monkeypatch.setattr(filtering, "SET_KINDS", ("quota", "diversity", "duplicates"))
    assert answers(filter_rows(DOUBLE, rules(*PAIR))) == ["a"]


def test_planted_held_out_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out prompts compared as they are spelt, not in their normal form."""
    rows, exam = [row("A  B?", "x"), row("c", "x")], held_out("a b ?")
    drop = rules(EXACT, contamination={"on_overlap": "drop"})
    assert [r.prompt for r in kept(rows, drop, exam)] == ["c"]
    monkeypatch.setattr(Row, "prompt_key", property(lambda self: self.prompt))
    assert [r.prompt for r in kept(rows, drop, exam)] == ["A  B?", "c"]


def test_planted_quota_by_wrong_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("x", str(i), score=1) for i in range(4)]
    quota = rules({"kind": "quota", "per_prompt": 2})
    assert len(kept(rows, quota)) == 2
    monkeypatch.setattr(set_rules, "quota_key", lambda row, rule: row.answer)
    assert len(kept(rows, quota)) == 4


def test_planted_comparison_that_lets_nan_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("x", "a", score=NAN), row("x", "b", score=1.0)]
    assert [r.answer for r in kept(rows, rules(THRESHOLD))] == ["b"]

    def compared(rule: Any, row: Row, field: str) -> str:
        return "low" if row.data[field] < rule.min else ""

    monkeypatch.setattr(row_rules_module, "_outside", compared)
    assert [r.answer for r in kept(rows, rules(THRESHOLD))] == ["a", "b"]


def test_planted_order_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranking by score alone leaves ties to the order in which rows came."""
    rows = [row("x", str(i), score=1) for i in range(6)]
    quota = rules({"kind": "quota", "per_prompt": 1})
    assert kept(rows, quota) == kept(rows[::-1], quota)
    monkeypatch.setattr(Row, "rank", lambda self, field, seed: -(self.score(field) or 0.0))
    assert kept(rows, quota) != kept(rows[::-1], quota)


def test_the_set_is_judged_without_what_rows_lost(caplog: pytest.LogCaptureFixture) -> None:
    """A row that a rule of rows drops takes no place in the set: the two steps may be apart."""
    rows = [dataclasses.replace(r, where=str(i)) for i, r in enumerate(DOUBLE)]
    config = rules({"kind": "length", "unit": "characters", "min": 2}, EXACT)
    with caplog.at_level(logging.WARNING), RowRules(config) as opened:
        found = judge_set(judge_rows(rows, opened, held_out()), config)
    assert [r.where for r in found.kept] == ["1"]
    assert not caplog.records
