"""The page of a sweep: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from shardwise.config.metrics import LOSS, Metric
from shardwise.config.redact import redact
from shardwise.metrics.progress import duration
from shardwise.report.api import plotly_source, script_safe
from shardwise.report.charts import Chart, Trace
from shardwise.report.page import Tile
from shardwise.report.series import EMPTY, Series, envelope
from shardwise.sweep.objective import Objective
from shardwise.sweep.plan import Plan
from shardwise.sweep.results import Result, Row, best, rows
from shardwise.sweep.table import short_keys, shown, table_of, value_text
from shardwise.sweep.trial import LOG_FILE, TRIALS, name_of

REFRESH_SECONDS = 30
MAX_LABELS = 9  # of an axis: beyond that its ends and middle
GONE = -0.14  # where a key that a trial does not have stands, below the axis


def render(plan: Plan, results: Sequence[Result], over: bool, left: float | None) -> str:
    """The page as text; until it is ``over`` it refreshes itself."""
    found = rows(results, plan.objective)
    charts = [
        chart
        for chart in (
            parallel(found, plan.objective),
            best_so_far(results, plan.objective),
            curves(results, plan.objective, plan.objective.metric),
            curves(results, plan.objective, LOSS),  # most objectives have a point a validation
        )
        if chart is not None
    ]
    environment = SandboxedEnvironment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(f"shardwise.{room}", "templates") for room in ("sweep", "report")]
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    table = table_of(plan, results, left)
    keys = _keys(found)
    return environment.get_template("sweep.html.j2").render(
        name=plan.config.name,
        over=over,
        refresh=REFRESH_SECONDS,
        lede=lede(found, plan.objective, table),
        tiles=tiles(found, results, plan.objective, left),
        charts=list(enumerate(charts)),
        keys=list(short_keys(keys).items()),
        rows=[_view(row, keys) for row in table["rows"]],
        metric=plan.objective.metric.label,
        failures=failures(results),
        plots_json=script_safe([{"data": c.traces, "layout": c.layout} for c in charts]),
        plotly=plotly_source() if charts else "",
    )


def _keys(found: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in found for key in row.point))


def _view(row: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A row as the template shows it."""
    short = {key: row["point"].get(key, "") for key in keys}
    speeds = [t["tokens_per_second"] for t in row["trials"] if t["tokens_per_second"]]
    times = [t["seconds"] for t in row["trials"] if t["seconds"]]
    sizes = [t["memory_gb"] for t in row["trials"] if t["memory_gb"]]
    return {
        "name": name_of(row["number"], 0),
        "values": [_word(value) for value in short.values()],
        "value": value_text(row),
        "runs": row["runs"],
        "state": row["state"],
        "speed": f"{sum(speeds) / len(speeds):,.0f}" if speeds else "",
        "memory": f"{max(sizes):.2f}" if sizes else "",
        "time": duration(sum(times) / len(times)) if times else "",
    }


def _word(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else redact(str(value))


def lede(found: Sequence[Row], objective: Objective, table: dict[str, Any]) -> str:
    """The sweep in one line."""
    ahead = best(found)
    if ahead is None:
        return "No trial has ended yet."
    what = f"{objective.metric.label} {value_text(table['best'])}"
    text = f"Best: {what} with {shown(ahead.point)} (trial {name_of(ahead.number, 0)})"
    others = [row for row in found[1:] if row.runs and row.half is not None]
    if ahead.half is not None and others:
        near = [row for row in others if _overlap(ahead, row)]
        text += (
            f"; the intervals of {len(near)} other point{'s' if len(near) > 1 else ''} reach into "
            "its own"
            if near
            else "; no other interval reaches into its own"
        )
    return f"{text}."


def _overlap(a: Row, b: Row) -> bool:
    assert a.value is not None and b.value is not None
    return abs(a.value - b.value) <= (a.half or 0.0) + (b.half or 0.0)


def tiles(
    found: Sequence[Row], results: Sequence[Result], objective: Objective, left: float | None
) -> list[Tile]:
    """The figures at the head of the page."""
    states = [result.state for result in results]
    over = [s for s in states if s in ("done", "pruned", "failed", "impossible")]
    counted = [f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states))]
    out = [Tile("Trials", f"{len(over)} of {len(states)} over", tuple(counted))]
    ahead = best(found)
    if ahead is not None:
        label = f"Best {objective.metric.label}"
        notes = (*shown(ahead.point).split(", "), f"{objective.better} is better")
        row = {"value": ahead.value, "half_interval": ahead.half}
        out.append(Tile(label, value_text(row), notes[:6]))
    times = [result.seconds for result in results if result.seconds]
    if times:
        notes = (f"{duration(min(times))} to {duration(max(times))} a trial",)
        out.append(Tile("Time of all trials", duration(sum(times)), notes))
    if left:
        out.append(Tile("About left", duration(left)))
    return out


def failures(results: Sequence[Result]) -> list[dict[str, str]]:
    """What did not end as it should, with the reason and its log."""
    return [
        {
            "name": result.name,
            "state": result.state,
            "point": redact(shown(result.point)),
            "reason": redact(result.reason),
            "log": f"{TRIALS}/{result.name}/{LOG_FILE}" if result.state != "impossible" else "",
        }
        for result in results
        if result.reason
    ]


# --- charts -------------------------------------------------------------------------------------


def _style(result: Result, ahead: str) -> dict[str, Any]:
    """How a trial's line is drawn."""
    if result.name == ahead:
        return {"color": "--c1", "width": 3}
    if result.state in ("running", "open"):
        return {"color": "--c2", "width": 1.6}
    if result.state == "pruned":
        return {"color": "--muted/0.55", "width": 1.2, "dash": "dot"}
    if result.state in ("failed", "impossible"):
        return {"color": "--bad/0.6", "width": 1.2, "dash": "dash"}
    return {"color": "--muted/0.45", "width": 1.3}


def _legend(chart: Chart, results: Sequence[Result], ahead: str) -> None:
    states = {result.state for result in results}
    if ahead:
        chart.add(f"best ({ahead})", "--c1", [])
    if "done" in states:
        chart.add("done", "--muted", [])
    if states & {"running", "open"}:
        chart.add("running", "--c2", [])
    if "pruned" in states:
        chart.add("pruned", "--muted", [], "dot")
    if states & {"failed", "impossible"}:
        chart.add("failed", "--bad", [], "dash")


def _ahead(found: Sequence[Row]) -> str:
    """The trial to draw in front: the first run of the best point."""
    ahead = best(found)
    return "" if ahead is None else ahead.results[0].name


class Axis:
    """One upright axis of parallel coordinates: where a value stands, from 0 to 1."""

    def __init__(self, label: str, values: Sequence[Any], upwards: bool = True) -> None:
        self.label = label
        known = [v for v in values if v is not None]
        numbers = [v for v in known if isinstance(v, int | float) and not isinstance(v, bool)]
        self.ends: tuple[float, float] | None = None
        if known and len(numbers) == len(known):
            low, high = min(numbers), max(numbers)
            self.log = low > 0 and high / low >= 10
            distinct = sorted(set(numbers))
            middle = math.sqrt(low * high) if self.log else (low + high) / 2
            few = len(distinct) <= MAX_LABELS
            self.ticks: list[Any] = distinct if few else [low, float(f"{middle:.3g}"), high]
            self.ends = (low, high) if upwards else (high, low)
        else:
            self.ticks = list(dict.fromkeys(map(_word, known)))

    def place(self, value: Any) -> float | None:
        """Where it stands; None for what is not there."""
        if value is None:
            return None
        if self.ends is None:
            last = len(self.ticks) - 1
            return float(self.ticks.index(_word(value)) / last) if last else 0.5
        if self.ends[0] == self.ends[1]:
            return 0.5
        low, high, at = (math.log(v) if self.log else v for v in (*self.ends, float(value)))
        return float((at - low) / (high - low))


def parallel(found: Sequence[Row], objective: Objective) -> Chart | None:
    """Parallel coordinates: a line a point, an axis a key, the objective's last.

    The better end of the objective is on top.
    """
    keys = _keys(found)
    drawn = [row for row in found if row.point]
    if not drawn or not keys:
        return None
    short = short_keys(keys)
    in_turn = sorted(drawn, key=lambda row: row.number)  # words stand as the search has them
    axes = [Axis(short[key], [row.point.get(key) for row in in_turn]) for key in keys]
    values = [row.value for row in drawn]
    if any(value is not None for value in values):
        axes.append(Axis(objective.metric.name, values, upwards=objective.better == "higher"))
    chart = Chart("Every point", "Search")
    ahead = _ahead(found)
    for row in reversed(drawn):  # the best on top
        given = [*(row.point.get(key) for key in keys), row.value][: len(axes)]
        places = [axis.place(value) for axis, value in zip(axes, given)]
        # A key that is not searched there stands below its axis; what has no value ends before.
        inner = [GONE if p is None else p for p in places[: len(keys)]]
        heights = [*inner, *places[len(keys) :]]
        chart.traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": list(range(len(heights))),
                "y": heights,
                "line": _style(row.results[0], ahead) | {"shape": "spline", "smoothing": 0.6},
                "marker": {"size": 4, "color": _style(row.results[0], ahead)["color"]},
                "name": name_of(row.number, 0),
                "text": [redact(_hover(row))] * len(heights),
                "hoverinfo": "text",
            }
        )
    _legend(chart, [row.results[0] for row in drawn], ahead)
    chart.layout = _frame(axes)
    chart.caption = "Each line is a point of the search; the better end of the last axis is on top."
    return chart


def _hover(row: Row) -> str:
    value = value_text({"value": row.value, "half_interval": row.half})
    return f"{name_of(row.number, 0)} ({row.state}) {value}: {shown(row.point)}"


def _frame(axes: Sequence[Axis]) -> dict[str, Any]:
    """Upright lines with labels, drawn over the plot's own axes."""
    shapes = [
        {
            "type": "line", "x0": i, "x1": i, "y0": 0, "y1": 1, "layer": "below",
            "line": {"color": "--line", "width": 2},
        }
        for i in range(len(axes))
    ]  # fmt: skip
    notes = []
    for i, axis in enumerate(axes):
        notes.append(_note(i, 1.13, axis.label, "--ink"))
        for tick in axis.ticks:
            place = axis.place(tick)
            assert place is not None
            text = tick if isinstance(tick, str) else f"{tick:.4g}"
            last = i == len(axes) - 1
            side = {"xanchor": "left" if not last else "right", "xshift": -7 if last else 7}
            notes.append(_note(i, place, text, "--muted") | side | {"bgcolor": "--card/0.75"})
    hidden = {"visible": False, "fixedrange": True}
    return {
        "xaxis": hidden | {"range": [-0.12, len(axes) - 0.9]},
        "yaxis": hidden | {"range": [GONE - 0.06, 1.2]},
        "shapes": shapes,
        "annotations": notes,
    }


def _note(x: float, y: float, text: str, color: str) -> dict[str, Any]:
    words = text if len(text) <= 24 else text[:23] + "…"
    return {
        "x": x, "y": y, "text": words, "showarrow": False, "font": {"color": color, "size": 12},
    }  # fmt: skip


def best_so_far(results: Sequence[Result], objective: Objective) -> Chart | None:
    """Values in the order in which trials ended, and the best of them so far."""
    ended = sorted(
        (r for r in results if r.state == "done" and r.value is not None),
        key=lambda r: (r.ended or 0.0, r.name),
    )
    if not ended:
        return None
    values = [r.value for r in ended if r.value is not None]
    record = [
        objective.sign * min(objective.sign * v for v in values[: i + 1])
        for i in range(len(values))
    ]
    x = list(range(1, len(values) + 1))
    chart = Chart("Best so far", "Search")
    point: Trace = {
        "type": "scatter", "mode": "markers", "x": x, "y": values,
        "marker": {"color": "--muted", "size": 7},
        "text": [redact(f"{r.name} {r.value:.4g}: {shown(r.point)}") for r in ended],
        "hoverinfo": "text",
    }  # fmt: skip
    line: Trace = {
        "type": "scatter", "mode": "lines", "x": x, "y": record,
        "line": {"color": "--c1", "width": 2.5, "shape": "hv"}, "hoverinfo": "y",
    }  # fmt: skip
    chart.add("a trial", "--muted", [point], "marker")
    chart.add("best so far", "--c1", [line])
    chart.layout = {
        "xaxis": {"title": {"text": "trials that have ended"}, "dtick": max(1, len(x) // 8)},
        "yaxis": {"title": {"text": objective.metric.unit or objective.metric.label}},
    }
    return chart


def curves(results: Sequence[Result], objective: Objective, metric: Metric) -> Chart | None:
    """A metric of the objective's stage of every trial by step, all on one axis.

    None where no trial has two points of it, or it is the objective's and drawn as such.
    """
    if metric == LOSS and objective.metric.name == LOSS.name:
        return None
    seen_of = {r.name: _curve(r, objective, metric) for r in results}
    drawn = [r for r in results if len(seen_of[r.name]) > 1]
    if not drawn:
        return None
    ahead = _ahead(rows(results, objective))
    chart = Chart(f"{metric.label}, {objective.stage}", "Search")
    chart.title = chart.title[0].upper() + chart.title[1:]
    for result in sorted(drawn, key=lambda r: r.name == ahead):
        seen = envelope(seen_of[result.name], 300)
        chart.traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [float(f"{v:.6g}") for v in seen.steps],
                "y": [float(f"{v:.6g}") for v in seen.mean],
                "line": _style(result, ahead),
                "name": redact(f"{result.name}: {shown(result.point)}"),
                "hoverinfo": "name+y",
                "hoverlabel": {"namelength": -1},
            }
        )
    _legend(chart, drawn, ahead)
    chart.layout = {
        "xaxis": {"title": {"text": "step"}, "tickformat": "~s"},
        "yaxis": {"title": {"text": metric.unit or metric.label}},
    }
    return chart


def _curve(result: Result, objective: Objective, metric: Metric) -> Series:
    if metric.name == objective.metric.name:
        return Series.of(*zip(*result.curve)) if result.curve else EMPTY
    return EMPTY if result.run is None else result.run.get(objective.stage, metric.name)
