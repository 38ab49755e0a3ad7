"""What the jobs of a run have made: their figures, as they declare them, and their artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardwise.metrics.declared import Metric
from shardwise.metrics.progress import written
from shardwise.report.rundata import RunData, summary_stages
from shardwise.report.summary import artifacts_of, num


@dataclass(frozen=True)
class Artifact:
    """Rows that a job has written, and where in the run's folder."""

    name: str
    rows: str
    path: str


@dataclass(frozen=True)
class JobView:
    """One job; ``figures``: label, value and unit."""

    name: str
    kind: str
    figures: tuple[tuple[str, str, str], ...]
    artifacts: tuple[Artifact, ...]


def jobs(run: RunData) -> list[JobView]:
    """Every job that has ended and trains nothing, in the order of the recipe."""
    return [_view(run, row) for row in summary_stages(run.summary) if artifacts_of(row)]


def _view(run: RunData, row: Mapping[str, Any]) -> JobView:
    name = str(row.get("name") or row.get("kind") or "?")
    measured = row.get("metrics")
    figures = [
        (metric.label, metric_text(metric, value), metric.unit)
        for key, given in (measured.items() if isinstance(measured, dict) else ())
        if (value := num(given)) is not None and (metric := run.metric(name, key))
    ]
    files = [
        Artifact(f"{name}.{key}", f"{int(num(said.get('rows')) or 0):,}", str(said.get("path", "")))
        for key, said in artifacts_of(row).items()
    ]
    return JobView(name, str(row.get("kind") or name), tuple(figures), tuple(files))


def metric_text(metric: Metric, value: float) -> str:
    """A figure as its declaration wants it; a whole number, that wants nothing special, whole."""
    if metric.format == Metric.format and value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return written(metric, value)
