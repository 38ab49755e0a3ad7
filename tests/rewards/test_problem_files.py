"""Problems of the user's own: what rows mean, two parts that share no prompt, errors with rows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from shardwise.errors import ConfigError, DataError
from shardwise.rewards import FileTaskConfig, ProblemSet, prompt_messages, solution_text
from shardwise.rewards.task_configs import AnyTask
from tests.data.containers import CONTAINERS, write_rows

pytest.importorskip("pyarrow")

TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9
).filter(str.strip)


def task(path: Path, **more: Any) -> FileTaskConfig:
    """As a recipe has it."""
    said = {"kind": "file", "path": str(path), **more}
    found: FileTaskConfig = TypeAdapter(AnyTask).validate_json(json.dumps(said))
    return found


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT, st.integers()), min_size=2, max_size=20,
                  unique_by=lambda r: r[0]),
    container=st.sampled_from(CONTAINERS),
    form=st.sampled_from(["text", "messages", "sharegpt", "columns"]),
)  # fmt: skip
def test_the_same_problems_in_every_form_and_container(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, int]],
    container: str,
    form: str,
) -> None:
    def row(asked: str, answer: str, number: int, form: str) -> dict[str, Any]:
        rest = {"answer": answer, "n": number % 2**31}
        if form == "columns":
            return {"question": asked, **rest}
        if form == "messages":
            return {"prompt": [{"role": "user", "content": asked}], **rest}
        if form == "sharegpt":
            return {"prompt": [{"from": "human", "value": asked}], **rest}
        return {"prompt": asked, **rest}

    folder = tmp_path_factory.mktemp("problems")
    (folder / "plain").mkdir()
    plain = task(write_rows([row(*r, "text") for r in rows], folder / "plain", "jsonl"), held_out=0)
    path = write_rows([row(*r, form) for r in rows], folder, container)
    columns = {"prompt": "question"} if form == "columns" else {}
    other = task(path, held_out=0, columns=columns)
    found, expected = (
        [p._replace(id="") for p in ProblemSet(t, "train_rl", None)] for t in (other, plain)
    )
    assert found == expected
    assert other.identity()[1] == plain.identity()[1]


@given(st.lists(TEXT, min_size=30, max_size=60, unique=True), st.floats(0.3, 0.7))
@settings(max_examples=15, deadline=None)
def test_a_share_is_told_by_the_prompt_alone(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], share: float
) -> None:
    folder = tmp_path_factory.mktemp("problems")
    rows = [{"prompt": p, "answer": i} for i, p in enumerate(prompts)]
    whole, part = (
        task(write_rows(r, folder, c), held_out=share)
        for r, c in ((rows, "jsonl"), (rows[::-1][:25], "json"))
    )
    train, held_out = ({p.question for p in whole.problems(s)} for s in ("train_rl", "held_out"))
    assert not train & held_out and train | held_out == set(prompts)
    assert {p.question for p in part.problems("held_out")} <= held_out
    assert list(whole.problems("train_sft")) == list(whole.problems("train_rl"))


def test_answers_and_what_reaches_the_verifier(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": 42.0, "cases": [[1, 2]]},
        {"prompt": "b", "answer": ["x", 2.5, "x"], "level": {"n": 1}},
        {"prompt": "c", "answer": True, "steps": "so"},
        {"prompt": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"},
                    {"role": "user", "content": "f"}], "answer": "g"},
        {"prompt": "h", "answer": "i", "system": "Be brief."},
    ]  # fmt: skip
    config = task(write_rows(rows, tmp_path, "jsonl"), held_out=0.0, system="Think.")
    a, b, c, d, h = ProblemSet(config, "train_rl", None)
    assert (a.answer, b.answer, b.others, c.answer) == ("42", "x", ("2.5",), "true")
    assert (a.meta, b.meta) == ({"cases": [[1, 2]]}, {"level": {"n": 1}})
    assert (
        d.question == "user: d\n\nassistant: e\n\nuser: f" and a.id == "rows.jsonl: line 1, byte 0"
    )
    assert [m["content"] for m in prompt_messages(d, config)] == ["Think.", "d", "e", "f"]
    assert [m["content"] for m in prompt_messages(h, config)] == ["Be brief.", "h"]
    steps = config.model_copy(update={"style": "steps"})
    assert solution_text(c, steps) == "so\nAnswer: true"
    with pytest.raises(ConfigError, match=r"rows\.jsonl: line 1, .*has no steps"):
        solution_text(a, steps)


def test_the_answer_behind_a_mark(tmp_path: Path) -> None:
    rows = [{"question": "2+2?", "answer": "2 and 2 are 4.\n#### 4"}]
    columns = {"prompt": "question"}
    config = task(
        write_rows(rows, tmp_path, "jsonl"), held_out=0, columns=columns, answer_after="####"
    )
    [problem] = ProblemSet(config, "train_sft", None)
    assert problem.answer == "4" and problem.meta == {"steps": "2 and 2 are 4."}
    with pytest.raises(DataError, match=r"line 1, .*nothing behind '---'"):
        list(config.model_copy(update={"answer_after": "---"}).problems("train_sft"))


def test_held_out_files_and_splits(tmp_path: Path) -> None:
    def rows(*prompts: str) -> list[dict[str, Any]]:
        return [{"prompt": p, "answer": p} for p in prompts]

    for name, prompts in (("train", "abc"), ("test", "de"), ("leak", "cxy")):
        (tmp_path / name).mkdir()
        write_rows(rows(*prompts), tmp_path / name, "jsonl")
    (tmp_path / "leak" / "rows.jsonl").rename(tmp_path / "other.jsonl")
    (tmp_path / "leak").rmdir()
    split = task(tmp_path / "*" / "rows.jsonl", held_out=str(tmp_path / "test" / "rows.jsonl"))
    with pytest.raises(DataError, match=r"asks what rows.jsonl: .*which is trained on; so do 2 of"):
        split.check()
    file = tmp_path / "train" / "rows.jsonl"
    other = task(file, held_out=str(tmp_path / "other.jsonl"))
    with pytest.raises(DataError, match=r"other.jsonl: line 1, .*1 of 3 held-out.*take them out"):
        other.check()
    apart = task(file, held_out=str(tmp_path / "test" / "rows.jsonl"))
    assert [p.question for p in apart.problems("held_out")] == ["d", "e"]
    (tmp_path / "other.jsonl").unlink()
    named = task(tmp_path, held_out="test")
    assert [p.question for p in named.problems("train_rl")] == ["a", "b", "c"]
    assert [p.question for p in named.problems("held_out")] == ["d", "e"]
    with pytest.raises(ConfigError, match=r"has 2 problems held out .*, 3 were asked for"):
        ProblemSet(named, "held_out", 3)


GOOD = {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"prompt": "c"}], r"line 2, byte \d+: field 'answer' is missing; fields: prompt"),
        ([GOOD, {"prompt": "c", "answer": " "}], r"line 2, .*'answer' is ' '"),
        ([GOOD, {"prompt": "c", "answer": []}], r"line 2, .*an empty list"),
        ([GOOD, {"prompt": "c", "answer": {"x": 1}}], r"line 2, .*a text or a number, or a list"),
        ([GOOD, {"prompt": " ", "answer": "b"}], r"line 2, .*'prompt' is neither"),
        ([GOOD, {"answer": "b"}], r"line 2, .*'prompt' is neither"),
        ([GOOD, {"prompt": [{"role": "assistant", "content": "x"}], "answer": "b"}],
         r"line 2, .*nothing is asked"),
        ([GOOD, {"prompt": "c", "answer": "d", "images": ["x"]}], r"line 2, .*'images' cannot be"),
        ([GOOD, {"prompt": "a", "answer": "c"}], r"line 2, .*asks what rows.jsonl: line 1, .*list"),
        ([{"question": "a", "answer": "b"}], r"near: problems with columns: {prompt: question}"),
        ([{"x": 1}], r"columns \(x\); read here: problems: prompt and answer"),
    ],
)  # fmt: skip
def test_bad_problems_are_named(tmp_path: Path, rows: Any, message: str) -> None:
    path = write_rows(rows, tmp_path, "jsonl")
    with pytest.raises(DataError, match=rf"rows\.jsonl: .*{message}"):
        task(path, held_out=0).check()


def test_parts_without_problems_and_copies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows([GOOD, GOOD, {"prompt": "c", "answer": 1}], tmp_path, "jsonl")
    with caplog.at_level(logging.INFO):
        assert len(ProblemSet(task(path, held_out=0), "train_rl", None)) == 2
    assert "detected problems (prompt, answer), 3 rows" in caplog.text
    assert "1 rows ask what an earlier one asks and are left out" in caplog.text
    for share, part in ((0.0001, "held out"), (0.9999, "trained on")):
        with pytest.raises(DataError, match=f"of 2 problems leaves none to be {part}"):
            task(path, held_out=share).check()
    assert len(ProblemSet(task(path, held_out=1.0), "held_out", None)) == 2
    with pytest.raises(ConfigError, match="has 0 problems to train on"):
        ProblemSet(task(path, held_out=1.0), "train_rl", None)
    with pytest.raises(ConfigError, match="has 0 problems held out"):
        ProblemSet(task(path, held_out=0), "held_out", None)


def test_what_is_no_json_cannot_reach_the_verifier(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"prompt": ["a"], "answer": [1], "day": [datetime.date(2026, 1, 1)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 0: field 'day' cannot reach the verifier"):
        task(tmp_path / "a.parquet", held_out=0).check()
    task(tmp_path / "a.parquet", held_out=0, ignore=["day"]).check()


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="did you mean 'prompt'"):
        task(tmp_path, columns={"prompts": "x"})
    with pytest.raises(ValidationError, match="seed"):
        task(tmp_path, seed=3)
    with pytest.raises(DataError, match="no such file"):
        task(tmp_path / "nowhere.jsonl").check()


def test_a_stand_in_has_what_a_small_stage_takes(tmp_path: Path) -> None:
    small = task(tmp_path / "nowhere.jsonl", answer_after="#", style="steps").shrunk(tmp_path, 96)
    train, held_out = (list(small.problems(s)) for s in ("train_rl", "held_out"))
    assert len(train) >= 64 and len(held_out) >= 24
    assert all(solution_text(p, small) for p in train)
