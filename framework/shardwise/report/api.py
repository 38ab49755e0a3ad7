"""`report(run_dir)`: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from shardwise.report import figures, page
from shardwise.report.charts import Chart
from shardwise.report.rundata import RunData, load_run
from shardwise.storage.durable import write_durably

REPORT_FILE = "report.html"


def report(run_dir: Path | str, out: Path | None = None) -> Path:
    """Write ``<run_dir>/report.html`` (or ``out``) from what the run has logged so far.

    The file holds its script and its data and opens no connection. Runs that are not finished,
    or whose summary lacks keys, give the sections they have data for. The file is replaced
    atomically, so a reader never sees half of it.

    Raises StorageError when it cannot be written, DataError when ``run_dir`` is not a run, or a
    file of it cannot be read.
    """
    target = out if out is not None else Path(run_dir) / REPORT_FILE
    html = render(load_run(Path(run_dir)))
    write_durably(target, html.encode("utf-8", "replace"))
    return target


def render(run: RunData) -> str:
    """The page of a run as text."""
    charts = figures.all_charts(run)
    groups: dict[str, list[tuple[int, Chart]]] = {}
    for i, chart in enumerate(charts):
        groups.setdefault(chart.group, []).append((i, chart))
    plots = [{"data": c.traces, "layout": c.layout} for c in charts]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            **page.view(run),
            groups=groups,
            sparks=figures.sparks(run, charts),
            plots_json=script_safe(plots),
            plotly=plotly_source() if charts else "",
        )
    )


@functools.cache
def _environment() -> SandboxedEnvironment:
    return SandboxedEnvironment(
        loader=jinja2.PackageLoader("shardwise.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def script_safe(data: Any) -> str:
    """JSON that cannot end the ``<script>`` element it stands in, whatever text it holds."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def plotly_source() -> str:
    """The source of plotly.js, as the plotly package ships it; importing that takes as long as the
    whole report."""
    found = importlib.util.find_spec("plotly")
    assert found is not None and found.submodule_search_locations  # a core dependency
    script = Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    return script.read_text(encoding="utf-8")
