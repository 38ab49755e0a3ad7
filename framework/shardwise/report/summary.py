"""The one-screen summary that ends `shardwise train`: at most 30 lines of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.metrics.progress import duration, number
from shardwise.report.rundata import summary_stages
from shardwise.report.series import wilson

WIDTH, HEIGHT = 80, 30
_LABEL = 12
_FIGURES = ("loss", "val_loss", "reward_mean")
_ROWS = 5


def num(value: Any) -> float | None:
    """``value`` if it is a finite number (not a bool), else None."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if ok and abs(value) < 1e300 else None


def sample_size(summary: Mapping[str, Any]) -> int | None:
    """The number of held-out problems, if it is known and one can count with it."""
    problems = num(summary.get("num_problems"))
    return int(problems) if problems is not None and problems >= 1 else None


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


def accuracies(summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The held-out accuracy after each stage, in the order of the summary."""
    table = summary.get("accuracy")
    pairs = table.items() if isinstance(table, dict) else []
    return [(str(k), f) for k, v in pairs if (f := num(v)) is not None]


def gemm_rate(gflops: float) -> str:
    """A rate of GFLOP/s with its unit."""
    return f"{gflops / 1000:.1f} TFLOP/s" if gflops >= 1000 else f"{gflops:.0f} GFLOP/s"


def _row(label: str, text: str) -> str:
    return f"  {label:<{_LABEL}}{text}"


def _compression(summary: Mapping[str, Any]) -> list[str]:
    bits = num(summary.get("val_bits_per_byte"))
    if bits is None:
        return []
    against = []
    for key, label in (("gzip_bits_per_byte", "gzip -9"), ("xz_bits_per_byte", "xz")):
        if reference := num(summary.get(key)):
            against.append(f"{compared(bits, reference)} {label} ({reference:.3f})")
    source = f" of {summary['val_source']}" if summary.get("val_source") else ""
    lines = [_row("validation", f"{bits:.3f} bits/byte{source}")]
    return lines + ([_row("", ", ".join(against))] if against else [])


def _accuracy(summary: Mapping[str, Any]) -> list[str]:
    rows = accuracies(summary)
    if not rows:
        return []
    n = sample_size(summary)
    lines: list[str] = []
    before = None
    width = min(max(len(name) for name, _ in rows), 20)
    for name, value in rows[:_ROWS]:
        change = "" if before is None else f"  {value - before:+.3f}"
        text = f"{name[:20]:<{width}}  {value:.3f}  {interval(value, n)}{change}"
        lines.append(_row("" if lines else "accuracy", text.rstrip()))
        before = value
    if len(rows) > _ROWS:
        lines.append(_row("", f"and {len(rows) - _ROWS} more in the report"))
    baseline = num(summary.get("majority_baseline"))
    notes = [f"{n} held-out problems, 95% intervals"] if n else []
    if baseline is not None:
        notes.insert(0, f"majority answer {baseline:.3f}")
    return lines + ([_row("", ", ".join(notes))] if notes else [])


def stage_figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and newest figures of each stage that has some: a reward, or its losses."""
    found = []
    for row in summary_stages(summary):
        figures = row.get("figures")
        if not isinstance(figures, dict):
            continue
        loss, validation, reward = (num(figures.get(k)) for k in _FIGURES)
        parts = [] if reward is None else [f"reward {reward:.3f}"]
        if loss is not None and reward is None:  # a policy's loss is no measure
            parts.append(f"loss {loss:.4g}")
        if validation is not None:
            parts.append(f"validation {validation:.4g}")
        if parts:
            found.append((str(row.get("name", "?")), ", ".join(parts)))
    return found


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
    lines += _losses(summary) + _compression(summary) + _accuracy(summary) + _speed(summary)
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
