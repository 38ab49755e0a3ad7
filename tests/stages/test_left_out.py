"""What of a user's files is not learned from stands in the run's folder, and on its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.data import left_out
from shardwise.data.left_out import LeftOut, leave_out
from shardwise.report import page
from shardwise.report.api import report
from shardwise.report.rundata import load_run
from tests.stages.recipes import recipe, run
from tests.support.pool import RankPool


def notes(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "notes.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == "left_out"]


def rows(path: Path, answers: list[str]) -> Path:
    said = [{"prompt": f"{i}?", "completion": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in said))
    return path


def test_a_place_counts_once_however_often_it_is_read() -> None:
    with left_out.scope() as found:
        for _ in range(2):
            for i in (3, 4):
                leave_out("empty", f"a.jsonl:{i}")
            left_out.tell([{"reason": "empty", "rows": 5, "first": "store.txt"}])
        with left_out.scope() as inner:
            leave_out(left_out.too_long(9), "b.jsonl:1")
    leave_out("empty", "c.jsonl:1")  # nobody listens
    assert found.all() == [LeftOut("empty", 7, "a.jsonl:3")]
    assert str(found.all()[0]) == "7 empty (first: a.jsonl:3)"
    assert inner.as_json() == [{"reason": "over 9 tokens", "rows": 1, "first": "b.jsonl:1"}]


@pytest.mark.parametrize("world", [1, 2])
def test_long_rows_and_empty_files_are_told_with_their_places(
    ranks: RankPool, tmp_path: Path, world: int
) -> None:
    config = recipe(tmp_path / "run", "pretrain", "sft")
    (tmp_path / "corpus" / "empty.txt").write_text("")
    answers = ["short"] * 8
    answers[2] = answers[5] = "long " * 60
    chats = rows(tmp_path / "chats.jsonl", answers)
    pretrain, sft = config["stages"]
    sft.pop("task"), sft.pop("num_problems")
    sft["data"] = {"sources": [{"path": str(chats)}], "too_long": "drop"}
    pretrain["steps"] = sft["steps"] = 1
    ranks.run(run, config, world=world)
    of_texts, of_chats = notes(tmp_path / "run")
    first = str(tmp_path / "corpus" / "empty.txt")
    assert of_texts["stage"] == "pretrain"
    assert of_texts["left_out"] == [{"reason": "empty", "rows": 1, "first": first}]
    [long] = of_chats["left_out"]
    assert (of_chats["stage"], long["reason"], long["rows"]) == ("sft", "over 97 tokens", 2)
    assert long["first"].startswith(f"{chats}: line 3")

    found = load_run(tmp_path / "run")
    assert not [e for e in page.events(found)[0] if e.event == "left_out"]
    text = report(tmp_path / "run").read_text()
    words = f"2 over 97 tokens (first: {long['first']})"
    assert f"Rows of its data that sft left out: {words}." in text


def test_nothing_is_told_where_nothing_is_left_out(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "sft")
    config["stages"][0]["steps"] = 1
    ranks.run(run, config, world=1)
    assert notes(tmp_path / "run") == []
    assert "left out" not in report(tmp_path / "run").read_text()
