"""What becomes of feedback: votes, quotas, and the gate behind them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.redact import HIDDEN
from shardwise.serve.feedback import Filter, Task, rows_of, split, tasks_of
from shardwise.serve.gate import Bounds, FedBack, forgetting, reasons


def said(*rows: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Records of a log: (client, prompt, answer, a rating or a correction), each."""
    records: list[dict[str, Any]] = []
    for i, (client, prompt, answer, verdict) in enumerate(rows):
        own = {"id": f"{i}", "client": client}
        asked = [{"role": "user", "content": prompt}]
        records += [
            {**own, "kind": "answer", "prompt": asked, "choices": [{"text": answer}]},
            {**own, "kind": "feedback", "choice": 0}
            | ({"rating": verdict} if isinstance(verdict, int) else {"correction": verdict}),
        ]
    return records


def found(*rows: tuple[Any, ...], rules: Filter | None = None) -> list[tuple[str, Any, Any]]:
    tasks, _ = tasks_of(said(*rows), rules)
    return [(t.prompt[0][1], t.good, t.bad) for t in tasks]


def dropped(*rows: tuple[Any, ...], rules: Filter | None = None) -> dict[str, int]:
    return tasks_of(said(*rows), rules)[1]


def test_ratings_and_corrections_are_votes() -> None:
    assert found(("a", "p", "x", 1)) == [("p", ("x",), ())]
    assert found(("a", "p", "x", -1)) == [("p", (), ("x",))]
    assert found(("a", "p", "x", "y")) == [("p", ("y",), ("x",))]
    assert found(("a", "p", "x", "x")) == [("p", ("x",), ())]
    assert found(("a", "p", "x", 1), ("b", "q", "z", "y")) == [
        ("p", ("x",), ()), ("q", ("y",), ("z",)),
    ]  # fmt: skip


def test_contradictions_are_dropped_and_majorities_win() -> None:
    rows = ("a", "p", "x", 1), ("b", "p", "x", -1)
    assert found(*rows) == [] and dropped(*rows) == {"contradicted": 2}
    most = [("abc"[i], "p", "x", 1) for i in range(3)]
    assert found(*most, ("d", "p", "x", -1)) == [("p", ("x",), ())]
    assert found(("a", "p", "0", "x"), ("b", "p", "0", "y")) == [("p", (), ("0",))]
    assert found(("a", "p", "0", "x"), ("b", "p", "0", "y"), ("c", "p", "0", "y")) == [
        ("p", ("y",), ("0",))
    ]


def test_a_client_has_one_vote_however_often_it_speaks() -> None:
    flood = [("evil", "p", "x", -1)] * 50
    assert found(("a", "p", "x", 1), ("b", "p", "x", 1), ("c", "p", "x", 1), *flood) == [
        ("p", ("x",), ())
    ]
    assert dropped(*flood) == {"repeated": 49}
    # Its last word counts.
    assert found(("a", "p", "x", 1), ("a", "p", "x", -1)) == [("p", (), ("x",))]


def test_a_flood_is_cut_at_the_quota_and_pushes_nobody_out() -> None:
    flood = [("evil", f"e{i}", "x", "bad") for i in range(500)]
    rows = [("a", "p", "x", 1), *flood, ("b", "q", "x", 1)]
    tasks = found(*rows, rules=Filter(per_client=10))
    assert len(tasks) <= 12 and {"p", "q"} <= {prompt for prompt, *_ in tasks}
    assert dropped(*rows, rules=Filter(per_client=10)) == {"beyond the client's quota": 990}


def test_what_cannot_be_used_is_dropped_and_counted() -> None:
    assert dropped(("a", f"mail {HIDDEN}", "x", 1), ("a", "p", f"{HIDDEN}", 1)) == {"redacted": 2}
    assert dropped(("a", "p", " ", 1)) == {"empty": 1}
    assert dropped(("a", "p" * 20_000, "x", 1)) == {"too long": 1}
    records = said(("a", "p", "x", 1))
    records[1]["client"] = "b"
    assert tasks_of(records) == ([], {"of another client's answer": 1})
    records[1]["id"] = "other"
    assert tasks_of(records) == ([], {"of no answer in the log": 1})
    records = said(("a", "p", "x", 1))
    records[1]["choice"] = 1
    assert tasks_of(records) == ([], {"of no answer in the log": 1})
    records = said(("a", "p", "x", 1))
    records[0]["prompt"] = "a text"
    assert tasks_of(records) == ([], {"of a text that is no chat": 1})


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.sampled_from("pqr"), st.sampled_from("xyz"),
            st.sampled_from([1, -1, "x", "w"]),
        ),
        max_size=30,
    ),
    st.integers(0, 2**32),
)  # fmt: skip
def test_no_text_is_good_and_bad_and_one_voice_moves_nothing_twice(
    rows: list[tuple[Any, ...]], seed: int
) -> None:
    tasks, _ = tasks_of(said(*rows))
    for task in tasks:
        assert not set(task.good) & set(task.bad) and task.good + task.bad
    assert len({t.prompt for t in tasks}) == len(tasks)
    # Whoever repeats the whole log in its own order gains nothing.
    assert tasks_of(said(*rows, *rows))[0] == tasks


def test_rows_have_the_formats_of_the_data_room() -> None:
    rows = rows_of([Task((("user", "p"),), ("g",), ("b", "c")), Task((("user", "q"),), (), ("b",))])
    assert [len(rows[k]) for k in ("sft", "dpo", "kto")] == [1, 2, 4]
    assert rows["kto"][0]["label"] is True and rows["kto"][3]["label"] is False
    assert rows["dpo"][1]["rejected"] == [{"role": "assistant", "content": "c"}]


@given(st.lists(st.text(max_size=5), unique=True, max_size=40), st.floats(0.05, 0.95))
def test_what_is_held_out_stays_so(prompts: list[str], share: float) -> None:
    tasks = [Task((("user", p),), ("g",), ()) for p in prompts]
    learn, held = split(tasks, share)
    assert sorted(t.hash for t in (*learn, *held)) == sorted(t.hash for t in tasks)
    # By the prompt alone: other answers, other neighbours, the same side.
    others = [dataclasses.replace(t, good=("other",)) for t in tasks[::2]]
    assert {t.prompt for t in split(others, share)[1]} <= {t.prompt for t in held}


# ----- the gate -----

BEFORE, AFTER = FedBack(0.2, 2.0, 50), FedBack(0.5, 1.0, 50)


def test_the_gate_opens_for_a_lift_without_forgetting() -> None:
    assert reasons(BEFORE, AFTER, {"val_bits_per_byte": 0.005, "accuracy": -0.1}, Bounds()) == []
    assert reasons(BEFORE, AFTER, {"val_bits_per_byte": 0.01}, Bounds()) == []


@pytest.mark.parametrize(
    ("after", "moved", "bounds", "why"),
    [
        (FedBack(0.1, 1.0, 50), {"accuracy": 0.0}, Bounds(), "accuracy went from 0.200"),
        (FedBack(0.25, 1.0, 50), {"accuracy": 0.0}, Bounds(min_lift=0.1), "rise by 0.1"),
        (FedBack(0.5, 2.0, 50), {"accuracy": 0.0}, Bounds(), "no likelier"),
        (FedBack(0.5, math.nan, 50), {"accuracy": 0.0}, Bounds(), "no likelier"),
        (AFTER, {"val_bits_per_byte": 0.011}, Bounds(), "forgetting: val_bits_per_byte"),
        (AFTER, {"a.accuracy": 0.02}, Bounds(), "forgetting: a.accuracy"),
        (AFTER, {"val_bits_per_byte": math.nan}, Bounds(), "forgetting"),
        (AFTER, {"val_bits_per_byte": math.inf}, Bounds(), "forgetting"),
        (AFTER, {}, Bounds(), "nothing was probed"),
    ],
)
def test_the_gate_closes(after: FedBack, moved: dict[str, float], bounds: Bounds, why: str) -> None:
    assert any(why in reason for reason in reasons(BEFORE, after, moved, bounds))


def test_forgetting_is_relative_for_bits_and_absolute_for_shares() -> None:
    base = {"val_bits_per_byte": 2.0, "x.accuracy": 0.5, "num_problems": 40, "val_source": "x"}
    now = {"val_bits_per_byte": 2.1, "x.accuracy": 0.4, "num_problems": 3}
    assert forgetting(base, now) == pytest.approx({"val_bits_per_byte": 0.05, "x.accuracy": 0.1})
    assert forgetting({"accuracy": 0.5}, {}) == {"accuracy": math.inf}
