"""The one-screen summary that ends `shardwise train`: at most 30 lines of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.metrics.declared import EVERY, START, Metric, Table, metric_of, of
from shardwise.metrics.progress import duration, number, written
from shardwise.report.rundata import summary_stages
from shardwise.report.series import wilson

WIDTH, HEIGHT = 80, 30
_LABEL = 12
_ROWS = 5
_MEASURED = 9  # lines of what was measured


def num(value: Any) -> float | None:
    """``value`` if it is a finite number (not a bool), else None."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if ok and abs(value) < 1e300 else None


def sample_size(summary: Mapping[str, Any], metric: Metric) -> int | None:
    """How many trials a share is of, if it is known and one can count with it."""
    trials = num(summary.get(metric.count)) if metric.count else None
    return int(trials) if trials is not None and trials >= 1 else None


def interval(fraction: float, n: int | None) -> str:
    """A 95 % Wilson interval as text, or nothing when the sample size is unknown."""
    if not n or not 0.0 <= fraction <= 1.0:
        return ""
    low, high = wilson(fraction, n)
    return f"[{low:.3f}, {high:.3f}]"


def compared(value: float, reference: float) -> str:
    """By how much a size is below or above a reference: "10.3% below"."""
    change = value / reference - 1.0
    return f"{abs(change) * 100:.1f}% {'below' if change < 0 else 'above'}"


def stage_table(summary: Mapping[str, Any], name: str) -> list[tuple[str, float]]:
    """What was measured after each stage, in the order of the summary."""
    table = summary.get(name)
    pairs = table.items() if isinstance(table, dict) else []
    return [(str(k), f) for k, v in pairs if (f := num(v)) is not None]


def against(summary: Mapping[str, Any], metric: Metric, value: float, table: Table) -> list[str]:
    """What a figure is held against: a share by its value, a size by how far it is from it."""
    found = []
    for name in metric.references:
        if reference := num(summary.get(name)):
            other = metric_of(table, START, name)
            text = written(other, reference)
            of_share = f"{other.label} {text}"
            of_size = f"{compared(value, reference)} {other.label} ({text})"
            found.append(of_share if metric.count else of_size)
    return found


def gemm_rate(gflops: float) -> str:
    """A rate of GFLOP/s with its unit."""
    return f"{gflops / 1000:.1f} TFLOP/s" if gflops >= 1000 else f"{gflops:.0f} GFLOP/s"


def _row(label: str, text: str) -> str:
    return f"  {label:<{_LABEL}}{text}"


def _first(summary: Mapping[str, Any], metric: Metric, table: Table) -> list[str]:
    """One figure of the run, and what it is held against."""
    value = num(summary.get(metric.name))
    if value is None:
        return []
    source = f" of {summary[metric.source]}" if summary.get(metric.source) else ""
    lines = [_row(metric.line, f"{written(metric, value)} {metric.unit}{source}")]
    known = against(summary, metric, value, table)
    return lines + ([_row("", ", ".join(known))] if known else [])


def _by_stage(summary: Mapping[str, Any], metric: Metric, table: Table) -> list[str]:
    """A figure after each stage, with its change."""
    rows = stage_table(summary, metric.name)
    if not rows:
        return []
    n = sample_size(summary, metric)
    lines: list[str] = []
    before = None
    width = min(max(len(name) for name, _ in rows), 20)
    for name, value in rows[:_ROWS]:
        change = "" if before is None else f"  {value - before:+.3f}"
        text = f"{name[:20]:<{width}}  {written(metric, value)}  {interval(value, n)}{change}"
        lines.append(_row("" if lines else metric.line, text.rstrip()))
        before = value
    if len(rows) > _ROWS:
        lines.append(_row("", f"and {len(rows) - _ROWS} more in the report"))
    notes = against(summary, metric, rows[-1][1], table)
    if n:
        notes.append(f"{n} {metric_of(table, START, metric.count).label}, 95% intervals")
    return lines + ([_row("", ", ".join(notes))] if notes else [])


def _measured(summary: Mapping[str, Any]) -> list[str]:
    """What the evaluations found; those with a label for a line, as many as there is room for."""
    table, lines, left_out = of(summary), list[str](), 0
    for metric in table[START].values():
        if metric.line and metric.summary:
            show = _first if metric.summary == "first" else _by_stage
            more = show(summary, metric, table)
            fits = len(lines) + len(more) <= _MEASURED
            lines += more if fits else []
            left_out += not fits
    if left_out:
        lines[-1] += f"; {left_out} more measured, in the report"
    return lines


def stage_figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and newest figures of each stage that has some, as it declares them."""
    found, table = [], of(summary)
    for row in summary_stages(summary):
        figures = row.get("figures")
        if not isinstance(figures, dict):
            continue
        name = str(row.get("name") or row.get("kind") or "?")
        parts = [
            f"{metric.line} {written(metric, value)}"
            for metric in table.get(name, EVERY).values()
            if metric.figure and (value := num(figures.get(metric.name))) is not None
        ]
        if parts:
            found.append((name, ", ".join(parts)))
    return found


def artifacts_of(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a job has written by name; empty for a stage that trains."""
    found = row.get("artifacts")
    pairs = found.items() if isinstance(found, dict) else []
    return {str(name): said for name, said in pairs if isinstance(said, dict)}


def _losses(summary: Mapping[str, Any]) -> list[str]:
    rows = stage_figures(summary)
    width = min(max((len(name) for name, _ in rows), default=0), 20)
    lines = [
        _row("" if i else "last step", f"{name[:20]:<{width}}  {text}")
        for i, (name, text) in enumerate(rows[:_ROWS])
    ]
    more = [_row("", f"and {len(rows) - _ROWS} more in the report")] if len(rows) > _ROWS else []
    return lines + more


def _speed(summary: Mapping[str, Any]) -> list[str]:
    parts = []
    if (tokens := num(summary.get("tokens_per_second"))) is not None:
        parts.append(f"{number(tokens)} tokens/s")
    if (fraction := num(summary.get("fraction_of_gemm"))) is not None:
        rate = num(summary.get("gemm_gflops"))
        of = f" ({gemm_rate(rate)})" if rate else ""
        parts.append(f"{fraction:.2f} of the machine's GEMM rate{of}")
    return [_row("speed", ", ".join(parts))] if parts else []


def _skipped(summary: Mapping[str, Any]) -> list[str]:
    """The updates that left the weights as they were, by stage."""
    table = summary.get("skipped_updates")
    if not isinstance(table, dict) or not table:
        return []
    tried = {r.get("name"): num(r.get("updates")) for r in summary_stages(summary)}
    parts = [f"{name} {n} of {tried.get(name) or 0:.0f} updates" for name, n in table.items()]
    return [_row("skipped", ", ".join(parts))]


def _expected(summary: Mapping[str, Any]) -> list[str]:
    """What was said at the start, to hold the times against."""
    table = summary.get("expected_seconds")
    pairs = table.items() if isinstance(table, dict) else []
    known = {str(name): f for name, s in pairs if (f := num(s)) is not None}
    if not known:
        return []
    parts = [f"{name[:20]} {duration(s)}" for name, s in known.items()]
    more = [f"and {len(parts) - _ROWS} more"] if len(parts) > _ROWS else []
    total = duration(sum(known.values()))
    untold = [str(name)[:20] for name, s in pairs if s is None]
    more += [f"not told: {', '.join(untold[:_ROWS])}"] if untold else []
    return [_row("expected", f"{total}: {', '.join(parts[:_ROWS] + more)}")]


def _stages(summary: Mapping[str, Any]) -> list[str]:
    rows = summary_stages(summary)
    if not rows:
        return []
    lines = ["", f"  {'stage':<{_LABEL}}{'steps':>6}{'tokens':>8}{'time':>8}  checkpoint"]
    for row in rows[:_ROWS]:
        steps, tokens = num(row.get("steps")), num(row.get("tokens"))
        times = [t for k in ("seconds", "wall_seconds") if (t := num(row.get(k))) is not None]
        # Evaluations included; of a resumed stage, at least all its steps.
        seconds = max(times, default=None)
        line = (
            f"  {str(row.get('name', '?'))[: _LABEL - 1]:<{_LABEL}}"
            f"{'' if steps is None else int(steps):>6}"
            f"{'' if tokens is None else number(tokens):>8}"
            f"{'' if seconds is None else duration(seconds):>8}  "
        )
        path = str(row.get("checkpoint") or "")
        path = path[max(path.find("stages/"), 0) :]  # within the run
        if files := artifacts_of(row):
            rows_of = (f"{name} {int(num(f.get('rows')) or 0):,}" for name, f in files.items())
            path = f"rows: {', '.join(rows_of)}"
        lines.append((line + shorten(path, WIDTH - len(line))).rstrip())
    if len(rows) > _ROWS:
        lines.append(f"  and {len(rows) - _ROWS} more in the report")
    return lines


def summary_lines(summary: Mapping[str, Any], report: str | None = None) -> list[str]:
    """A run's summary.json as text; missing keys leave their line out.

    ``report`` is the path of the HTML report, named in the last line. At most `HEIGHT` lines;
    a line longer than `WIDTH` loses its middle (a path's end says more than its start).
    """
    wall = num(summary.get("wall_seconds"))
    parts = [f"shardwise  {summary.get('name') or 'run'}"]
    layouts = [str(row["layout"]) for row in summary_stages(summary) if row.get("layout")]
    layouts = [a for a, b in zip(layouts, [None, *layouts]) if a != b]  # where it changed
    if layouts or summary.get("layout"):
        parts.append(" > ".join(layouts or [str(summary["layout"])]))
    if wall is not None:
        parts.append(f"{'stopped after' if summary.get('stopped') else 'done in'} {duration(wall)}")
    lines = ["  ".join(parts), ""]
    lines += _losses(summary) + _measured(summary) + _speed(summary)
    lines += _skipped(summary) + _expected(summary) + _stages(summary)
    if report:
        lines += ["", _row("report", shorten(report, WIDTH - _LABEL - 2))]
    return [shorten(" ".join(line.splitlines()) if line else "", WIDTH) for line in lines]


def shorten(text: str, width: int) -> str:
    """``text`` within ``width`` characters, its middle replaced when it is longer."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
