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
from shardwise.report.series import Floats, Series, envelope, smooth

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
    shown: set[tuple[str, str]] = field(default_factory=set)  # (stage, metric) that it draws

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


def how_drawn(series: Sequence[Series]) -> str:
    longest = max(series, key=len, default=None)
    width = envelope(longest).width if longest is not None else 1
    if width == 1 or longest is None:
        return ""
    return (
        f"{len(longest):,} points in groups of {width}: the band runs from a group's lowest to "
        "its highest point."
    )


def reference(chart: Chart, label: str, value: float, dash: str, x: Sequence[float]) -> None:
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


def axes(x: str, y: str) -> dict[str, Any]:
    across: dict[str, Any] = {"title": {"text": x}}
    if x.startswith("step"):
        across["tickformat"] = "~s"  # 150k
    return {"xaxis": across, "yaxis": {"title": {"text": y}}}
