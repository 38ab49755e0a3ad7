"""Which charts a run has: those that its stages and evaluations declare, where there are data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shardwise.metrics.declared import EVERY, START, Metric, Plot
from shardwise.report.charts import (
    PALETTE,
    SMOOTH_FROM,
    Chart,
    Key,
    Trace,
    axes,
    curve,
    how_drawn,
    reference,
)
from shardwise.report.rundata import RunData
from shardwise.report.series import envelope, wilson
from shardwise.report.summary import num, sample_size, stage_table

_DASHES = ("dash", "dot")


def stage_offsets(run: RunData) -> dict[str, int]:
    """Steps that were done before each stage, to draw all stages on one axis."""
    offsets, total = {}, 0
    for stage in run.stages:
        offsets[stage] = total
        last = [int(s.steps[-1]) for (name, _), s in run.series.items() if name == stage and len(s)]
        total += max(last, default=0)
    return offsets


def plots_of(metrics: Iterable[Metric]) -> dict[Plot, list[Metric]]:
    """The metrics of each chart, in order."""
    found: dict[Plot, list[Metric]] = {}
    for metric in metrics:
        if metric.plot is not None:
            found.setdefault(metric.plot, []).append(metric)
    return found


def references(run: RunData, metric: Metric, stages: Sequence[str]) -> list[tuple[str, float, str]]:
    """Label, value and dash of what ``metric`` is held against in all of ``stages``."""
    known = [(name, num(run.summary.get(name))) for name in metric.references]
    return [
        (run.metric(START, name).label, value, dash)
        for (name, value), dash in zip(known, _DASHES, strict=False)
        # Of other documents it is no measure.
        if value is not None and all(run.get(s, name).last in (None, value) for s in stages)
    ]


def stage_chart(run: RunData, stage: str, plot: Plot, metrics: Sequence[Metric]) -> Chart | None:
    """What of ``plot`` one stage has logged, by its steps; None without a curve."""
    logged = [(m, s) for m in metrics if len(s := run.get(stage, m.name))]
    if all(len(series) < 2 for _, series in logged):  # one point is a tile's business
        return None
    first = logged[0][0]
    chart = Chart(f"{plot.title}, {stage}", plot.group, layout=axes("step", first.unit))
    _scale(chart, plot, [series.values for _, series in logged])
    for (metric, series), color in zip(logged, _colors(logged), strict=True):
        marks = len(series) < SMOOTH_FROM
        traces = curve(series, color, marks=marks, exact=plot.exact)
        chart.add(metric.label, color, traces, "marker" if marks else "solid")
        chart.shown.add((stage, metric.name))
    _hold_against(chart, run, logged[0][0], [stage])
    chart.caption = f"{plot.caption} {how_drawn([s for _, s in logged])}".strip()
    if len(chart.legend) == 1:  # the title has said it
        chart.legend.clear()
    return chart


def across_chart(run: RunData, plot: Plot) -> Chart | None:
    """What of ``plot`` all stages have logged, one after the other on one axis."""
    logged = [
        (stage, metric, series)
        for stage in run.stages
        for metric in plots_of(run.metrics(stage).values()).get(plot, ())
        if len(series := run.get(stage, metric.name))
    ]
    if not logged:
        return None
    first, stages = logged[0][1], [stage for stage, _, _ in logged]
    several = len(stages) > 1
    chart = Chart(plot.title, plot.group, caption=plot.caption)
    chart.shown = {(stage, metric.name) for stage, metric, _ in logged}
    # By the stage, whichever of them a chart has.
    place = {stage: PALETTE[i % len(PALETTE)] for i, stage in enumerate(run.stages)}
    if first.references and all(len(set(s.steps.tolist())) == 1 for _, _, s in logged):
        known = [(name, value, "--muted") for name, value, _ in references(run, first, stages)]
        rows = [(stage, float(s.values[-1]), PALETTE[0]) for stage, _, s in logged]
        _dots(chart, [*rows, *known], first.unit)
        return chart
    chart.layout = axes("step (all stages)" if several else "step", first.unit)
    _scale(chart, plot, [series.values for _, _, series in logged])
    offsets = stage_offsets(run)
    for stage, _, series in logged:
        offset, color = offsets[stage] if several else 0, place[stage]
        marks = bool(first.references) and len(series) < 100
        chart.add(stage, color, curve(series, color, offset=offset, marks=marks, exact=plot.exact))
    _hold_against(chart, run, first, stages)
    chart.caption = f"{plot.caption} {how_drawn([s for _, _, s in logged])}".strip()
    return chart


def _colors(logged: Sequence[object]) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(len(logged))]


def _scale(chart: Chart, plot: Plot, values: Sequence[np.ndarray]) -> None:
    if plot.log and all(v.min() > 0 for v in values if len(v)):
        chart.layout["yaxis"] |= {"type": "log"}


def _hold_against(chart: Chart, run: RunData, metric: Metric, stages: Sequence[str]) -> None:
    """Lines for what a metric is held against, over all that the chart has drawn."""
    ends = [x for trace in chart.traces for x in (trace["x"][0], trace["x"][-1])]
    for label, value, dash in references(run, metric, stages):
        reference(chart, label, value, dash, [min(ends), max(ends)])


def _dots(chart: Chart, rows: Sequence[tuple[str, float, str]], unit: str) -> None:
    """One dot a row (name, value, colour), the first on top."""
    point: Trace = {
        "type": "scatter",
        "mode": "markers+text",
        "x": [v for _, v, _ in rows],
        "y": [f"{n} " for n, _, _ in rows],  # the space keeps names such as "2" categorical
        "text": [f"{v:.3f}" for _, v, _ in rows],
        "textposition": "top center",
        "textfont": {"color": "--ink", "size": 13},
        "marker": {"size": 12, "color": [c for _, _, c in rows]},
    }
    chart.traces.append(point)
    chart.layout = axes(unit, "")
    values = [v for _, v, _ in rows]
    spread = max(max(values) - min(values), 0.1 * abs(max(values))) or 1.0
    chart.layout["xaxis"] |= {"range": [min(values) - 0.3 * spread, max(values) + 0.3 * spread]}
    chart.layout["yaxis"] |= {"type": "category", "range": [len(rows) - 0.5, -0.7]}


def after_stages_chart(run: RunData, metric: Metric) -> Chart | None:
    """What was measured after each stage, a share with its 95 % intervals."""
    rows = stage_table(run.summary, metric.name)
    if not rows:
        return None
    chart = Chart(f"{metric.label[0].upper()}{metric.label[1:]} after each stage", "Learning")
    values = [value for _, value in rows]
    _dots(chart, [(name, value, "--c1") for name, value in rows], metric.unit)
    chart.legend.append(Key(metric.label, "--c1", "marker"))
    trials = sample_size(run.summary, metric)
    if metric.count and all(0.0 <= v <= 1.0 for v in values):
        chart.layout["xaxis"] |= {"range": [-0.08, 1.08], "tickformat": ".0%"}
        if trials:
            bounds = [wilson(v, trials) for v in values]
            chart.traces[0]["error_x"] = {
                "type": "data",
                "symmetric": False,
                "array": [high - v for v, (_, high) in zip(values, bounds, strict=True)],
                "arrayminus": [v - low for v, (low, _) in zip(values, bounds, strict=True)],
                "color": "--c1",
                "thickness": 2,
            }
            what = run.metric(START, metric.count).label
            chart.caption = f"{trials} {what}; bars are 95% Wilson intervals."
    names = chart.traces[0]["y"]
    for label, value, dash in references(run, metric, []):
        line: Trace = {
            "type": "scatter",
            "mode": "lines",
            "x": [value, value],
            "y": [names[0], names[-1]],
            "line": {"color": "--muted", "width": 1.5, "dash": dash},
        }
        if len(names) == 1:
            line |= {"mode": "markers", "marker": {"symbol": "line-ns-open", "size": 24}}
        chart.add(f"{label} {value:.3f}", "--muted", [line], dash)
    return chart


def all_charts(run: RunData) -> list[Chart]:
    """Every chart that the run has data for: what was measured, what its stages are watched by,
    what every stage has.
    """
    measured = list(run.metrics(START).values())
    common = {m.plot.group for m in EVERY.values() if m.plot is not None}
    found = [across_chart(run, plot) for plot in plots_of(measured) if plot.across]
    found += [after_stages_chart(run, m) for m in measured if m.summary == "stages"]
    plots = [(s, plots_of(run.metrics(s).values())) for s in run.stages]
    alone = [
        stage_chart(run, stage, plot, metrics)
        for stage, of_stage in plots
        for plot, metrics in of_stage.items()
        if not plot.across
    ]
    found += sorted(alone, key=lambda chart: chart is not None and chart.group in common)
    across = dict.fromkeys(plot for _, of_stage in plots for plot in of_stage if plot.across)
    found += [across_chart(run, plot) for plot in across if plot not in plots_of(measured)]
    return [chart for chart in found if chart is not None]


@dataclass(frozen=True)
class Spark:
    """A small curve for metrics without a chart of their own; ``points`` is an SVG polyline."""

    stage: str
    name: str
    label: str
    first: float
    low: float
    high: float
    last: float
    points: str


def sparks(
    run: RunData, charts: Sequence[Chart] = (), width: int = 160, height: int = 28
) -> list[Spark]:
    """Every metric that none of ``charts`` shows, drawn in ``width`` x ``height`` pixels."""
    out = []
    shown = {pair for chart in charts for pair in chart.shown}
    for (stage, name), series in run.series.items():
        # A layer's of the sentinel: the page has their table.
        if (stage, name) in shown or not len(series) or name.startswith("fp8."):
            continue
        drawn = envelope(series, width // 2)
        low, high = float(series.values.min()), float(series.values.max())
        x = np.interp(drawn.steps, [drawn.steps[0], drawn.steps[-1] + 1e-9], [1, width - 1])
        y = height - 2 - (drawn.mean - low) / ((high - low) or 1.0) * (height - 4)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        first, last = float(series.values[0]), float(series.values[-1])
        label = run.metric(stage, name).label
        out.append(Spark(stage, name, label, first, low, high, last, points))
    return out
