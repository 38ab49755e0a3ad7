"""What the rules see of rows, whatever format they are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.curation.rows import FILTERED, read_source, row_of
from shardwise.data.source import DataSource
from shardwise.errors import DataError
from tests.curation.support import row

USER = {"role": "user", "content": "2 + 2?"}
FOUR = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}

ALIKE: list[tuple[str, dict[str, Any]]] = [
    ("prompt-completion", {"prompt": "2 + 2?", "completion": "4"}),
    ("prompt-completion", {"prompt": [SYSTEM, USER], "completion": [FOUR]}),
    ("prompt-completion", {"prompt": "2 + 2?", "completion": "4", "system": "Be brief."}),
    ("messages", {"messages": [SYSTEM, USER, FOUR]}),
    ("messages", {"messages": [{**USER, "content": [{"type": "text", "text": "2 + 2?"}]}, FOUR]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "2 + 2?"},
                                    {"from": "gpt", "value": "4"}]}),
    ("alpaca", {"instruction": "2 + 2?", "output": "4"}),
    ("problems", {"prompt": "2 + 2?", "answer": 4}),
    ("problems", {"prompt": [USER], "answer": ["4"]}),
    ("steps", {"prompt": "2 + 2?", "steps": ["4"], "labels": [1]}),
    ("preference", {"prompt": "2 + 2?", "completion": "4", "label": True}),
]  # fmt: skip


@pytest.mark.parametrize(("format", "data"), ALIKE)
def test_formats_say_the_same(format: str, data: dict[str, Any]) -> None:
    found = row_of(format, data)
    assert (found.prompt, found.answers) == ("2 + 2?", ("4",))
    assert found.data is data


def test_preferences_stand_best_first() -> None:
    two = row_of("preference", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
    rated = row_of(
        "preference", {"prompt": [USER], "answers": ["3", "4", [FOUR]], "ratings": [0, 2, 1]}
    )
    implicit = row_of(
        "preference", {"chosen": [USER, FOUR], "rejected": [USER, {**FOUR, "content": "5"}]}
    )
    assert two.answers == ("4", "5") == implicit.answers
    assert rated.answers == ("4", "4", "3")
    assert two.prompt == rated.prompt == implicit.prompt


def test_a_conversation_is_asked_up_to_its_last_answer() -> None:
    found = row_of("messages", {"messages": [USER, FOUR, {**USER, "content": "Sure?"}, FOUR]})
    assert (found.prompt, found.answers) == ("2 + 2?\n\n4\n\nSure?", ("4",))


@pytest.mark.parametrize(
    ("format", "data", "words"),
    [
        ("prompt-completion", {"prompt": "a"}, "'completion' is missing"),
        ("prompt-completion", {"prompt": 3, "completion": "a"}, "'prompt' is neither a text"),
        ("messages", {"messages": [USER]}, "no assistant turn"),
        ("messages", {"messages": []}, "no list of messages"),
        ("preference", {"prompt": "a", "answers": []}, "give 'chosen'"),
        ("steps", {"prompt": "a", "steps": [1], "labels": [1]}, "'steps' is neither"),
        ("problems", {"answer": "a"}, "'prompt' is missing"),
    ],
)
def test_what_is_no_row_is_named(format: str, data: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=rf"/x/a.jsonl: line 3: .*{words}"):
        row_of(format, data, "/x/a.jsonl: line 3")


def test_scores_are_finite_numbers() -> None:
    nan = float("nan")
    for value, score in ((1, 1.0), (True, 1.0), (0.5, 0.5), (nan, None), ("1", None), ([], None)):
        assert row("a", "b", score=value).score("score") == score
    deep = row("a", "b", tree={"value": 2}, **{"dotted.name": 3})
    assert (deep.score("tree.value"), deep.score("dotted.name")) == (2.0, 3.0)
    assert deep.score("tree.value.more") is None is deep.score("none")


def test_the_best_row_stands_first_whatever_else_it_has() -> None:
    rows = [row("a", "b", score=s, id=i) for i, s in enumerate([0.5, None, 2, float("nan")])]
    ranked = sorted(rows, key=lambda r: r.rank("score", 0))
    assert [r.data["id"] for r in ranked][:2] == [2, 0]
    ties = [row("a", str(i), score=1) for i in range(8)]
    orders = {tuple(sorted(range(8), key=lambda i: ties[i].rank("score", s))) for s in range(20)}
    assert len(orders) > 10


def test_sources_keep_every_field_under_our_names(tmp_path: Path) -> None:
    said = {"question": "2 + 2?", "response": "4", "score": 0.5, "tree": {"visits": [3, 1]}}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(said) + "\n")
    source = DataSource.model_validate(
        {"path": path, "columns": {"prompt": "question", "completion": "response"}}
    )
    [found] = read_source(source)
    assert found.format == "prompt-completion" in FILTERED
    assert found.data == {
        "prompt": "2 + 2?", "completion": "4", "score": 0.5, "tree": {"visits": [3, 1]}
    }  # fmt: skip
    assert found.where == "rows.jsonl: line 1, byte 0"
