"""The one table of a sweep: as CSV, JSON and Markdown, written anew as trials end."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from shardwise import terminal
from shardwise.config.redact import redact
from shardwise.metrics.progress import duration, number
from shardwise.storage.durable import write_durably
from shardwise.sweep.config import Point
from shardwise.sweep.plan import Plan
from shardwise.sweep.results import Result, Row, best, rows
from shardwise.sweep.trial import name_of

TABLE, PAGE_FILE = "table", "sweep.html"


def table_of(plan: Plan, results: Sequence[Result], left: float | None = None) -> dict[str, Any]:
    """The table as JSON values: the objective, the best point, and each point with its trials.

    Points are in the order of `rows`: the best first. ``left``: seconds.
    """
    found = rows(results, plan.objective)
    ahead = best(found)
    objective = plan.objective
    return {
        "name": plan.config.name,
        "sweep_dir": str(plan.directory),
        "objective": {
            "stage": objective.stage,
            "metric": objective.metric.name,
            "unit": objective.metric.unit,
            "better": objective.better,
            "take": objective.take,
        },
        "best": None if ahead is None else _row(ahead),
        "trials": dict(Counter(result.state for result in results)),
        "seconds_left": left,
        "rows": [_row(row) for row in found],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "number": row.number,
        "point": row.point,
        "state": row.state,
        "value": row.value,
        "half_interval": row.half,
        "runs": row.runs,
        "trials": [
            {
                "name": result.name,
                "state": result.state,
                "value": result.value,
                "step": result.step,
                "seconds": result.seconds,
                "tokens_per_second": result.tokens_per_second,
                "memory_gb": result.memory_gb,
                "reason": redact(result.reason),
            }
            for result in row.results
        ],
    }


_FIGURES = ("state", "value", "step", "seconds", "tokens_per_second", "memory_gb", "reason")


def csv_of(table: dict[str, Any]) -> str:
    """A line for each trial; a column for each key that is searched."""
    keys = list(dict.fromkeys(key for row in table["rows"] for key in row["point"]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", *keys, *_FIGURES])
    for row in table["rows"]:
        for trial in row["trials"]:
            point = [_cell(row["point"].get(key, "")) for key in keys]
            figures = ["" if trial[name] is None else trial[name] for name in _FIGURES]
            writer.writerow([trial["name"], *point, *figures])
    return out.getvalue()


def markdown_of(table: dict[str, Any]) -> str:
    """A line for each point, the best first; then what failed, and why."""
    keys = list(dict.fromkeys(key for row in table["rows"] for key in row["point"]))
    short = short_keys(keys)
    objective = table["objective"]
    head = ["trial", *(short[key] for key in keys), objective["metric"], "state", "tok/s"]
    head += ["GB", "time"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in table["rows"]:
        cells = [name_of(row["number"], 0), *(_cell(row["point"].get(key, "")) for key in keys)]
        cells += [value_text(row), row["state"], *_means(row["trials"])]
        lines.append("| " + " | ".join(_safe(cell) for cell in cells) + " |")
    note = f"{objective['take']} {objective['metric']} of {objective['stage']}"
    note += f", {objective['better']} is better"
    if any(row["half_interval"] is not None for row in table["rows"]):
        note += "; ± is half a 95% interval over runs with other seeds"
    text = [f"# {_safe(table['name'])}", "", f"{note}.", "", *lines]
    failures = [t for row in table["rows"] for t in row["trials"] if t["reason"]]
    if failures:
        text += ["", "## What did not end", ""]
        text += [f"- {t['name']} ({t['state']}): {_safe(t['reason'])}" for t in failures]
    return "\n".join(text) + "\n"


def _means(trials: Sequence[dict[str, Any]]) -> list[str]:
    """Mean throughput, most memory and mean time of a point's trials, those that are known."""
    speeds, sizes, times = (
        [t[key] for t in trials if t[key] is not None]
        for key in ("tokens_per_second", "memory_gb", "seconds")
    )
    return [
        number(sum(speeds) / len(speeds)) if speeds else "",
        f"{max(sizes):.2f}" if sizes else "",
        duration(sum(times) / len(times)) if times else "",
    ]


def value_text(row: dict[str, Any]) -> str:
    """``1.234 ± 0.012``."""
    if row["value"] is None:
        return ""
    half = row["half_interval"]
    spread = "" if half is None else f" ± {half:.0f}" if half >= 10 else f" ± {half:.2g}"
    return f"{row['value']:.4g}{spread}"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _safe(text: str) -> str:
    """Text in one cell of Markdown."""
    return terminal.one_line(redact(" ".join(text.split()))).replace("|", "\\|")


def write_tables(plan: Plan, table: dict[str, Any]) -> None:
    """``table.json``, ``table.csv`` and ``table.md``, each replaced in one step."""
    texts = {
        "json": json.dumps(table, indent=1, ensure_ascii=False) + "\n",
        "csv": csv_of(table),
        "md": markdown_of(table),
    }
    for ending, text in texts.items():
        write_durably(plan.directory / f"{TABLE}.{ending}", text.encode("utf-8", "replace"))


def shown(point: Point) -> str:
    """A point as a line says it: ``lr 0.001, layout dp2``."""
    short = short_keys(list(point))
    return ", ".join(f"{short[key]} {_cell(value)}" for key, value in point.items())


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key by as few of its last words as tell it from the others."""
    found = {}
    for key in keys:
        words = key.split(".")
        short = key
        for num in range(1, len(words) + 1):
            short = ".".join(words[-num:])
            if sum(f".{other}".endswith(f".{short}") for other in keys) == 1:
                break
        found[key] = short
    return found
