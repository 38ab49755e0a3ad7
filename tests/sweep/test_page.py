"""The table and the page: complete, safe, and with the best in front."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.metrics import LOSS, Metric
from shardwise.report.rundata import RunData
from shardwise.report.series import Series
from shardwise.sweep.objective import Objective
from shardwise.sweep.page import Axis, best_so_far, curves, parallel
from shardwise.sweep.plan import make_plan
from shardwise.sweep.results import Result, best, remaining, rows
from shardwise.sweep.run import publish
from shardwise.sweep.table import csv_of, markdown_of, short_keys, table_of
from tests.sweep.conftest import LR

LOWER = Objective("pretrain", Metric("val_loss", "validation loss", "nats"), "lower")
HIGHER = Objective("grpo", Metric("reward_mean", "reward"), "higher")


def result(number: int, value: float | None, state: Any = "done", **rest: Any) -> Result:
    point = {LR: 10.0 ** -(number % 3 + 1), "engine.layout": ["dp2", "tp2"][number % 2]}
    curve = [] if value is None else [(s, value + 1 / s) for s in range(1, 6)]
    name = f"{number:04d}" + (f"-r{rest['repeat']}" if rest.get("repeat") else "")
    return Result(
        name, number, rest.pop("repeat", 0), point, state, value=value, curve=curve,
        **({"seconds": 10.0, "ended": float(number)} | rest),
    )  # fmt: skip


SEVERAL = [
    result(0, 2.0), result(1, 1.0), result(2, None, "failed", reason="</script><b>x</b> | no"),
    result(3, 0.5, "pruned", reason="worse"), result(4, 3.0, "running", ended=None),
    result(5, None, "waiting"),
]  # fmt: skip


def test_the_best_that_has_ended_is_in_front() -> None:
    assert [row.number for row in rows(SEVERAL, LOWER)] == [1, 0, 3, 4, 2, 5]
    assert [row.number for row in rows(SEVERAL, HIGHER)] == [0, 1, 4, 3, 2, 5]
    ahead = best(rows(SEVERAL, LOWER))
    assert ahead is not None and ahead.value == 1.0
    assert best(rows(SEVERAL[2:], LOWER)) is None


def test_repeats_are_one_row_with_an_interval() -> None:
    several = [result(0, v, repeat=i) for i, v in enumerate([1.0, 2.0, 3.0])]
    [row] = rows([*several, result(0, 9.0, "running", repeat=3)], LOWER)
    assert (row.value, row.runs, row.state) == (2.0, 3, "running")
    assert row.half == pytest.approx(4.303 / 3**0.5, rel=1e-3)  # t of 2 degrees, deviation 1


KEYS = st.text("ab.", min_size=1, max_size=6).filter(lambda key: "" not in key.split("."))


@given(st.lists(KEYS, unique=True))
def test_short_keys_tell_keys_apart(keys: list[str]) -> None:
    short = short_keys(keys)
    assert len(set(short.values())) == len(keys)
    assert all(f".{key}".endswith(f".{s}") for key, s in short.items())


@given(
    st.lists(st.floats(1e-6, 1e6) | st.none(), min_size=1).filter(lambda v: any(v)), st.booleans()
)
def test_an_axis_keeps_the_order_of_numbers(values: list[float | None], upwards: bool) -> None:
    axis = Axis("x", values, upwards)
    known = sorted(v for v in values if v is not None)
    places = [axis.place(v) for v in known]
    assert all(p is not None and -1e-9 <= p <= 1 + 1e-9 for p in places)
    assert places == sorted(places, reverse=not upwards)  # type: ignore[type-var]
    assert axis.place(None) is None


def test_charts_show_every_trial() -> None:
    chart = parallel(rows(SEVERAL, LOWER), LOWER)
    assert chart is not None and len(chart.traces) == len(SEVERAL)
    labels = [key.label for key in chart.legend]
    assert labels == ["best (0001)", "done", "running", "pruned", "failed"]
    assert chart.traces[-1]["line"]["color"] == "--c1"  # drawn last, so on top
    record = best_so_far(SEVERAL, LOWER)
    assert record is not None and record.traces[1]["y"] == [2.0, 1.0]
    record = best_so_far(SEVERAL, HIGHER)
    assert record is not None and record.traces[1]["y"] == [2.0, 2.0]
    drawn = curves(SEVERAL, LOWER, LOWER.metric)
    assert drawn is not None and len(drawn.traces) == 4


def test_the_training_loss_is_drawn_beside_an_objective_of_few_points() -> None:
    run = RunData("a")
    run.series[LOWER.stage, LOSS.name] = Series.of([1, 2, 3], [3.0, 2.0, 1.0])
    one = dataclasses.replace(result(0, 1.0), curve=[(3, 1.0)], run=run)
    assert curves([one], LOWER, LOWER.metric) is None
    drawn = curves([one], LOWER, LOSS)
    assert drawn is not None and drawn.traces[0]["y"] == [3.0, 2.0, 1.0]
    loss = dataclasses.replace(LOWER, metric=LOSS)
    assert curves([one], loss, LOSS) is None, "drawn as the objective's"


def test_the_remaining_time_is_known_before_a_trial_has_ended() -> None:
    first = [result(0, 2.0, "running", step=10, seconds=None), result(1, None, "waiting")]
    assert remaining(first, {"0000": 5.0}, 1, 40, 1) == pytest.approx(15.0 + 20.0)
    assert remaining(first, {"0000": 5.0}, 2, 40, 1) == pytest.approx(35.0 / 2)
    assert remaining([result(1, None, "waiting")], {}, 1, 40, 1) is None
    assert remaining(SEVERAL, {"0004": 4.0}, 1, 40, 1) == pytest.approx(6.0 + 10.0)


def test_tables_hold_every_trial_and_the_page_is_safe(load: Callable[..., Any]) -> None:
    plan = make_plan(load(name="a-sweep"))
    table = table_of(plan, SEVERAL, 12.0)
    assert len(list(csv.reader(io.StringIO(csv_of(table))))) == len(SEVERAL) + 1
    text = markdown_of(table)
    assert all(f"| 000{i} |" in text for i in range(6)) and r"\| no" in text
    publish(plan, SEVERAL, over=False, left=12.0)
    page = (plan.directory / "sweep.html").read_text()
    assert 'http-equiv="refresh"' in page and "</script><b>" not in page
    assert "&lt;/script&gt;&lt;b&gt;x" in page
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page.partition("<script>")[0])
    plots = re.search(r'id="plots">(.*?)</script>', page, re.DOTALL)
    assert plots and len(json.loads(plots[1])) == 3
