"""`report(run_dir)` and `compare(run_dirs)`: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import functools
import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from shardwise.report import compare as comparison
from shardwise.report import figures, page
from shardwise.report.charts import Chart
from shardwise.report.rundata import RunData, load_run
from shardwise.storage.durable import write_durably

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"


def report(run_dir: Path | str, out: Path | None = None) -> Path:
    """Write ``<run_dir>/report.html`` (or ``out``) from what the run has logged so far.

    The file holds its script and its data and opens no connection. Runs that are not finished,
    or whose summary lacks keys, give the sections they have data for. The file is replaced
    atomically, so a reader never sees half of it.

    Raises StorageError when it cannot be written, DataError when ``run_dir`` is not a run, or a
    file of it cannot be read.
    """
    target = target_of([run_dir], out)
    write(target, render(load_run(Path(run_dir))))
    return target


def compare(run_dirs: Sequence[Path | str], out: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Write a page that compares runs, as `report` writes one; and its content as plain data.

    ``out`` is by default ``comparison.html`` in the folder that holds all of them, or in the
    working directory. Raises as `report` does, and UserError for one folder given twice. A run with
    a damaged file is on the page with what is wrong; another one is needed.
    """
    sides = comparison.load(run_dirs)
    target = target_of(run_dirs, out)
    write(target, render_comparison(sides))
    return target, comparison.data(sides)


def target_of(run_dirs: Sequence[Path | str], out: Path | None) -> Path:
    """Where the page of these runs goes."""
    if out is not None or len(run_dirs) == 1:
        return out or Path(run_dirs[0]) / REPORT_FILE
    parents = {Path(run_dir).resolve().parent for run_dir in run_dirs}
    return (parents.pop() if len(parents) == 1 else Path()) / COMPARISON_FILE


def write(target: Path, html: str) -> None:
    """Replace a page atomically."""
    write_durably(target, html.encode("utf-8", "replace"))


def render(run: RunData, live: float = 0) -> str:
    """The page of a run as text; ``live``: seconds after which it loads itself again."""
    charts = figures.all_charts(run)
    values = page.view(run) | {"sparks": figures.sparks(run, charts)}
    return _page("report.html.j2", charts, live, values)


def render_comparison(sides: Sequence[comparison.Side], live: float = 0) -> str:
    """The page of several runs."""
    return _page("compare.html.j2", comparison.overlays(sides), live, comparison.view(sides))


def _page(name: str, charts: Sequence[Chart], live: float, values: Mapping[str, Any]) -> str:
    groups: dict[str, list[tuple[int, Chart]]] = {}
    for i, chart in enumerate(charts):
        groups.setdefault(chart.group, []).append((i, chart))
    plots = [{"data": c.traces, "layout": c.layout} for c in charts]
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return (
        _environment()
        .get_template(name)
        .render(
            **values,
            groups=groups,
            plots_json=script_safe(plots),
            plotly=plotly_source() if charts else "",
            live=live,
            written=written,
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
