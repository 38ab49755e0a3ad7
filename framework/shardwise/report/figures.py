"""Charts as plain data: Plotly traces whose colours are names of the page's CSS variables.

The page's script resolves ``--c1`` (and ``--c1/0.2``, with an opacity) to the colour of the
reader's theme. Legends are HTML above the plot, so nothing can lie over a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardwise.report import diagnosis
from shardwise.report.rundata import RunData
from shardwise.report.series import Floats, Series, envelope, smooth, wilson
from shardwise.report.summary import accuracies, num, sample_size

Trace = dict[str, Any]

PALETTE = ("--c1", "--c2", "--c3", "--c4", "--c5", "--c6")
SMOOTH_FROM = 40  # points; below it a running mean says nothing the points do not
NOISY = 0.005  # noise over range; below it the points are a line already


@dataclass(frozen=True)
class Key:
    """An entry of a legend; ``dash`` is solid, dash, dot or marker."""

    label: str
    color: str
    dash: str = "solid"


@dataclass
class Chart:
    """One plot: ``traces`` and ``layout`` in Plotly's terms, ``caption`` says how it was drawn."""

    title: str
    group: str
    traces: list[Trace] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    legend: list[Key] = field(default_factory=list)
    caption: str = ""

    def add(
        self, label: str, color: str, traces: list[dict[str, Any]], dash: str = "solid"
    ) -> None:
        """Append traces with one entry in the legend."""
        self.traces += traces
        self.legend.append(Key(label, color, dash))


def _floats(values: Any) -> list[float]:
    """Rounded to six figures: a report need not carry the noise of a double."""
    return [float(f"{v:.6g}") for v in values]


def curve(
    series: Series, color: str, *, offset: int = 0, marks: bool = False, exact: bool = False
) -> list[Trace]:
    """Traces of one series: its points (faint), its running mean; an envelope when it is long.

    ``marks`` draws every point as a dot, ``exact`` leaves the running mean out.
    """
    drawn = envelope(series)
    x = _floats(drawn.steps + offset)
    line: Trace = {"type": "scatter", "x": x, "y": _floats(drawn.mean), "mode": "lines"}
    line["line"] = {"color": color, "width": 2}
    if marks or len(series) < 3:
        return [line | {"mode": "lines+markers", "marker": {"color": color, "size": 6}}]
    calm = line
    if not exact and len(series) >= SMOOTH_FROM and _is_noisy(drawn.mean):
        calm = line | {"y": _floats(smooth(drawn.mean, max(2, len(x) // 50)))}
    if drawn.width > 1:
        outline = {
            "type": "scatter",
            "x": [*x, *reversed(x)],
            "y": [*_floats(drawn.high), *reversed(_floats(drawn.low))],
            "mode": "lines",
            "fill": "toself",
            "fillcolor": f"{color}/0.22",
            "line": {"width": 0, "color": color},
            "hoverinfo": "skip",
        }
        return [outline, calm]
    if calm is line:
        return [line]
    return [line | {"line": {"color": f"{color}/0.32", "width": 1}, "hoverinfo": "skip"}, calm]


def _is_noisy(values: Floats) -> bool:
    """Whether neighbours differ enough for a running mean to be worth drawing."""
    return diagnosis.noise_sigma(values) > NOISY * float(np.ptp(values))


def _how_drawn(series: Sequence[Series]) -> str:
    longest = max(series, key=len, default=None)
    width = envelope(longest).width if longest is not None else 1
    if width == 1 or longest is None:
        return ""
    return (
        f"{len(longest):,} points in groups of {width}: the band runs from a group's lowest to "
        "its highest point."
    )


def _reference(chart: Chart, label: str, value: float, dash: str, x: Sequence[float]) -> None:
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": [value, value],
        "line": {"color": "--muted", "width": 1.5, "dash": dash},
        "hoverinfo": "y+name",
        "name": label,
    }
    chart.add(f"{label} {value:.3f}", "--muted", [line], dash)


def stage_offsets(run: RunData) -> dict[str, int]:
    """Steps that were done before each stage, to draw all stages on one axis."""
    offsets, total = {}, 0
    for stage in run.stages:
        offsets[stage] = total
        last = [int(s.steps[-1]) for (name, _), s in run.series.items() if name == stage and len(s)]
        total += max(last, default=0)
    return offsets


def is_reinforcement(run: RunData, stage: str) -> bool:
    """Whether ``stage`` logs a reward."""
    return len(run.get(stage, *diagnosis.REWARD)) > 0


def loss_charts(run: RunData) -> list[Chart]:
    """Loss of each stage, with validation loss where there is any."""
    charts = []
    for stage in run.stages:
        train, validation = run.get(stage, "loss"), run.get(stage, "val_loss")
        if not len(train) and not len(validation):
            continue
        policy, kind = is_reinforcement(run, stage), run.stage_config(stage).get("kind")
        chart = Chart(f"{'Policy loss' if policy else 'Loss'}, {stage}", "Loss")
        comparison = kind in ("reward", "dpo")
        unit = "nats per comparison" if comparison else "nats per token"
        chart.layout = _axes("step", "surrogate loss" if policy else unit)
        if len(train):
            chart.add("training", "--c1", curve(train, "--c1"))
        if len(validation):
            chart.add("validation", "--c2", curve(validation, "--c2", marks=True), "marker")
        chart.caption = _how_drawn([train])
        if policy:
            chart.caption = f"{chart.caption} A policy's loss need not fall.".strip()
        charts.append(chart)
    return charts


def compression_chart(run: RunData) -> Chart | None:
    """Validation bits per byte with gzip and xz as lines."""
    name = "val_bits_per_byte"
    stages = [s for s in run.stages if len(run.get(s, name))]
    if not stages:
        return None
    chart = Chart("Validation, bits per byte", "Learning")
    chart.caption = "Lower is better. gzip and xz compress each held-out file alone."
    references = (("gzip -9", "gzip_bits_per_byte", "dash"), ("xz", "xz_bits_per_byte", "dot"))
    known = [
        (n, v, d)
        for n, k, d in references
        if (v := num(run.summary.get(k))) is not None
        # Of other documents it is no measure.
        and all(run.get(s, k).last in (None, v) for s in stages)
    ]
    if all(len(set(run.get(s, name).steps.tolist())) == 1 for s in stages):
        rows = [(s, float(run.get(s, name).values[-1])) for s in stages]
        _dots(
            chart, [(n, v, PALETTE[0]) for n, v in rows] + [(n, v, "--muted") for n, v, _ in known]
        )
        return chart
    chart.layout = _axes("step (all stages)" if len(stages) > 1 else "step", "bits per byte")
    offsets = stage_offsets(run) if len(stages) > 1 else {}
    ends: list[float] = []
    for i, stage in enumerate(stages):
        series, color = run.get(stage, name), PALETTE[i % len(PALETTE)]
        offset = offsets.get(stage, 0)
        chart.add(stage, color, curve(series, color, offset=offset, marks=len(series) < 100))
        ends += [float(series.steps[0] + offset), float(series.steps[-1] + offset)]
    for label, value, dash in known:
        _reference(chart, label, value, dash, [min(ends), max(ends)])
    return chart


def _dots(chart: Chart, rows: Sequence[tuple[str, float, str]]) -> None:
    """One dot a row (name, value, colour), the first on top."""
    point: Trace = {
        "type": "scatter",
        "mode": "markers+text",
        "x": [v for _, v, _ in rows],
        "y": [f"{n} " for n, _, _ in rows],
        "text": [f"{v:.3f}" for _, v, _ in rows],
        "textposition": "top center",
        "textfont": {"color": "--ink", "size": 13},
        "marker": {"size": 12, "color": [c for _, _, c in rows]},
    }
    chart.traces.append(point)
    chart.layout = _axes("bits per byte", "")
    values = [v for _, v, _ in rows]
    spread = max(max(values) - min(values), 0.1 * max(values))
    chart.layout["xaxis"] |= {"range": [min(values) - 0.3 * spread, max(values) + 0.3 * spread]}
    chart.layout["yaxis"] |= {"type": "category", "range": [len(rows) - 0.5, -0.7]}


def accuracy_chart(run: RunData) -> Chart | None:
    """Held-out accuracy after each stage with 95 % intervals, beside the majority answer."""
    rows = accuracies(run.summary)
    if not rows:
        return None
    problems = sample_size(run.summary)
    chart = Chart("Held-out accuracy after each stage", "Learning")
    names = [f"{name} " for name, _ in rows]  # the space keeps names such as "2" categorical
    values = [value for _, value in rows]
    point: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers+text",
        "x": values,
        "y": names,
        "text": [f"{v:.3f}" for v in values],
        "textposition": "top center",
        "textfont": {"color": "--ink", "size": 13},
        "marker": {"size": 12, "color": "--c1"},
    }
    if problems and all(0.0 <= v <= 1.0 for v in values):
        bounds = [wilson(v, problems) for v in values]
        point["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [high - v for v, (_, high) in zip(values, bounds)],
            "arrayminus": [v - low for v, (low, _) in zip(values, bounds)],
            "color": "--c1",
            "thickness": 2,
        }
        chart.caption = f"{problems} problems; bars are 95% Wilson intervals."
    chart.add("accuracy", "--c1", [point], "marker")
    chart.layout = _axes("share of problems solved", "")
    chart.layout["xaxis"] |= {"range": [-0.08, 1.08], "tickformat": ".0%"}
    chart.layout["yaxis"] |= {"type": "category", "range": [len(rows) - 0.5, -0.7]}
    if (baseline := num(run.summary.get("majority_baseline"))) is not None:
        line = {
            "type": "scatter",
            "mode": "lines",
            "x": [baseline, baseline],
            "y": [names[0], names[-1]],
            "line": {"color": "--muted", "width": 1.5, "dash": "dash"},
        }
        if len(names) == 1:
            line |= {"mode": "markers", "marker": {"symbol": "line-ns-open", "size": 24}}
        chart.add(f"majority answer {baseline:.3f}", "--muted", [line], "dash")
    return chart


def over_all_stages(
    run: RunData,
    title: str,
    names: Sequence[str],
    unit: str,
    group: str,
    log: bool = False,
    exact: bool = False,
) -> Chart | None:
    """One metric of every stage that has it, on one axis of steps."""
    offsets = stage_offsets(run)
    stages = [s for s in run.stages if len(run.get(s, *names))]
    if not stages:
        return None
    chart = Chart(title, group, layout=_axes("step (all stages)", unit))
    if log and all(run.get(s, *names).values.min() > 0 for s in stages):
        chart.layout["yaxis"] |= {"type": "log"}
    for i, stage in enumerate(run.stages):
        series, color = run.get(stage, *names), PALETTE[i % len(PALETTE)]
        if len(series):
            chart.add(stage, color, curve(series, color, offset=offsets[stage], exact=exact))
    chart.caption = _how_drawn([run.get(s, *names) for s in stages])
    return chart


_POLICY = (
    ("Reward", diagnosis.REWARD, "mean reward"),
    ("Held-out accuracy", diagnosis.ACCURACY, "share solved"),
    ("Entropy", diagnosis.ENTROPY, "nats per token"),
    ("KL to the reference", ("kl",), "nats per token"),
    ("KL to the reference", ("kl_response",), "nats per response"),
    ("Explained variance of the critic", ("explained_variance",), "1: it foresees the returns"),
    ("KL of the update", ("approx_kl",), "nats per token"),
    ("Spread of rewards in a group", ("reward_std",), "standard deviation"),
    ("Groups without contrast", diagnosis.DEGENERATE, "share of groups"),
    ("Completion length", diagnosis.LENGTH, "tokens"),
    ("Clipped tokens", ("clip_fraction",), "share of tokens"),
)


def policy_charts(run: RunData) -> list[Chart]:
    """What reinforcement learning is watched by, for each stage that logs a reward."""
    charts = []
    for stage in run.stages:
        if not is_reinforcement(run, stage):
            continue
        for title, names, unit in _POLICY:
            if len(series := run.get(stage, *names)) > 1:  # one point is a tile's business
                chart = Chart(f"{title}, {stage}", "Reinforcement", layout=_axes("step", unit))
                marks = len(series) < SMOOTH_FROM
                chart.traces = curve(series, "--c1", marks=marks)
                chart.caption = _how_drawn([series])
                baseline = num(run.summary.get("majority_baseline"))
                if names is diagnosis.ACCURACY and baseline is not None:
                    x = [float(series.steps[0]), float(series.steps[-1])]
                    chart.legend.append(Key("accuracy", "--c1", "marker" if marks else "solid"))
                    _reference(chart, "majority answer", baseline, "dash", x)
                charts.append(chart)
    return charts


_SIDES = (("chosen", "--c1"), ("rejected", "--c2"))
_PREFERENCE = (
    ("Log-probability of answers", "logps", "nats per answer"),
    ("Drift from the reference", "drift", "nats per answer"),
    ("Implicit rewards", "rewards", "beta times the log-ratio"),
)


def preference_charts(run: RunData) -> list[Chart]:
    """Where chosen and rejected answers go, for each stage that is held against both."""
    charts = []
    for stage in run.stages:
        for title, name, unit in _PREFERENCE:
            sides = [(s, c, run.get(stage, f"{name}_{s}")) for s, c in _SIDES]
            if all(len(series) > 1 for _, _, series in sides):
                chart = Chart(f"{title}, {stage}", "Preferences", layout=_axes("step", unit))
                for side, color, series in sides:
                    chart.add(side, color, curve(series, color, marks=len(series) < SMOOTH_FROM))
                chart.caption = _how_drawn([series for _, _, series in sides])
                charts.append(chart)
    return charts


def all_charts(run: RunData) -> list[Chart]:
    """Every chart that the run has data for, in the order of the page."""
    found = [compression_chart(run), accuracy_chart(run)]
    found += policy_charts(run)
    found += preference_charts(run)
    found += loss_charts(run)
    found += [
        over_all_stages(run, "Gradient norm", ["grad_norm"], "L2 norm", "Optimizer", log=True),
        over_all_stages(run, "Learning rate", ["lr"], "", "Optimizer", exact=True),
        over_all_stages(run, "Throughput", ["tokens_per_second"], "tokens per second", "Speed"),
        over_all_stages(
            run, "Fraction of the machine's GEMM rate", ["fraction_of_gemm"], "", "Speed"
        ),
        over_all_stages(run, "Memory", ["memory_gb"], "GB, peak of rank 0", "Speed"),
    ]
    for title, name, unit in _FP8:
        found.append(over_all_stages(run, title, [name], unit, "FP8"))
    return [chart for chart in found if chart is not None]


# The worst layer of each look of the sentinel; the page has a table of all layers.
_FP8 = (
    ("Error of the FP8 products", "fp8_error", "share of the product's norm"),
    ("Drift of the amaxes", "fp8_drift", "log2 since the last look"),
    ("Underflow", "fp8_underflow", "share of the elements"),
    ("Overflow", "fp8_overflow", "share of the elements"),
)

_DRAWN = {
    "loss", "val_loss", "val_bits_per_byte", "grad_norm", "lr", "tokens_per_second",
    "fraction_of_gemm", "memory_gb",
    *(name for _, names, _ in _POLICY for name in names),
    *(name for _, name, _ in _FP8),
}  # fmt: skip


@dataclass(frozen=True)
class Spark:
    """A small curve for metrics without a chart of their own; ``points`` is an SVG polyline."""

    stage: str
    name: str
    first: float
    low: float
    high: float
    last: float
    points: str


def sparks(run: RunData, width: int = 160, height: int = 28) -> list[Spark]:
    """Every remaining metric, drawn in ``width`` x ``height`` pixels."""
    out = []
    for (stage, name), series in run.series.items():
        if name in _DRAWN and (stage, name) not in _only_in_summary(run):
            continue
        if not len(series) or name.startswith("fp8."):  # a layer's: the page has their table
            continue
        drawn = envelope(series, width // 2)
        low, high = float(series.values.min()), float(series.values.max())
        x = np.interp(drawn.steps, [drawn.steps[0], drawn.steps[-1] + 1e-9], [1, width - 1])
        y = height - 2 - (drawn.mean - low) / ((high - low) or 1.0) * (height - 4)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        first, last = float(series.values[0]), float(series.values[-1])
        out.append(Spark(stage, name, first, low, high, last, points))
    return out


def _only_in_summary(run: RunData) -> set[tuple[str, str]]:
    """Metrics whose name has a chart, but not for this stage (accuracy without a reward)."""
    names = {name for _, group, _ in _POLICY for name in group}
    return {
        (stage, name)
        for stage, name in run.series
        if name in names and not is_reinforcement(run, stage)
    }


def _axes(x: str, y: str) -> dict[str, Any]:
    across: dict[str, Any] = {"title": {"text": x}}
    if x.startswith("step"):
        across["tickformat"] = "~s"  # 150k
    return {"xaxis": across, "yaxis": {"title": {"text": y}}}
