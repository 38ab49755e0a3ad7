"""Reads a run's folder, whole or half done, into what the report is made of."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shardwise import safe_files
from shardwise.config import yaml12
from shardwise.errors import DataError
from shardwise.metrics.declared import EVERY, START, Metric, Table, metric_of, of
from shardwise.metrics.jsonl import read_jsonl
from shardwise.metrics.writers import METRICS_FILE, NOTES_FILE
from shardwise.report.series import EMPTY, Series
from shardwise.resilience.attempts import ATTEMPTS_FILE
from shardwise.resilience.ending import EXIT_FILE
from shardwise.storage.lock import alive

_HEAD = frozenset({"time", "stage", "step", "kind"})


class NoRunError(DataError):
    """A folder that no run has written to."""


@dataclass
class RunData:
    """What is known of a run. Everything may be missing, except the folder's name."""

    name: str
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    stages: list[str] = field(default_factory=list)
    series: dict[tuple[str, str], Series] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    declared: Table = field(default_factory=dict)
    exit_code: int | None = None  # of the last end, while nothing has begun since
    reason: str = ""
    num_attempts: int = 0
    living: bool = False
    num_lines: int = 0
    first_time: float | None = None
    last_time: float | None = None

    def get(self, stage: str, name: str) -> Series:
        """What ``stage`` has logged under ``name``, or an empty series.

        One whose values were all non-finite is empty too, but counts them.
        """
        return self.series.get((stage, name), EMPTY)

    def metrics(self, stage: str) -> Mapping[str, Metric]:
        """What ``stage`` declares; ``start`` has what the evaluations do."""
        return self.declared.get(stage, {} if stage == START else EVERY)

    def metric(self, stage: str, name: str) -> Metric:
        """The declaration of one, or what can be said of it without."""
        return metric_of(self.declared, stage, name)

    def names(self, stage: str) -> list[str]:
        """The metrics that ``stage`` has logged, in order of appearance."""
        return [name for s, name in self.series if s == stage]

    def stage_config(self, stage: str) -> dict[str, Any]:
        """The config of ``stage``, or an empty mapping."""
        stages = self.config.get("stages")
        for item in stages if isinstance(stages, list) else []:
            if isinstance(item, dict) and stage == _effective_name(item):
                return item
        return {}

    def stage_summary(self, stage: str) -> dict[str, Any]:
        """What summary.json says of ``stage``, or an empty mapping."""
        for item in summary_stages(self.summary):
            if item.get("name") == stage:
                return item
        return {}


def summary_stages(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages that a summary lists; entries that are not mappings are left out."""
    stages = summary.get("stages")
    return [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []


def load_run(run_dir: Path) -> RunData:
    """Read metrics.jsonl, notes.jsonl, summary.json and config.yaml, and how it ended: what exists.

    Figures that the summary lacks are taken from the metrics where they hold them.

    Raises NoRunError when there is none of them, DataError when one cannot be read (ConfigError for
    config.yaml). Damage to what says how it ended is an event.
    """
    files = [run_dir / n for n in (METRICS_FILE, "summary.json", "config.yaml")]
    if not any(f.exists() for f in (*files, run_dir / EXIT_FILE, run_dir / ATTEMPTS_FILE)):
        raise NoRunError(
            f"{run_dir} is not a run: it holds none of metrics.jsonl, summary.json, config.yaml; "
            "name a folder that `shardwise train` wrote, such as runs/quickstart"
        )
    run = RunData(name=run_dir.resolve().name)
    if files[1].exists():
        run.summary = _mapping(_json(files[1]), files[1])
    if files[2].exists():
        run.config_text = safe_files.read_bytes(files[2]).decode("utf-8", "replace")
        run.config = _mapping(yaml12.parse(run.config_text, str(files[2])).data or {}, files[2])
    run.name = str(run.summary.get("name") or run.config.get("name") or run.name)
    _collect(run, read_jsonl(files[0]))
    run.events.extend(read_jsonl(run_dir / NOTES_FILE))
    _ending(run, run_dir)
    run.events.sort(key=lambda e: e["time"] if isinstance(e.get("time"), (int, float)) else 0.0)
    for name in [*(s.get("name") for s in summary_stages(run.summary)), *config_stages(run)]:
        if isinstance(name, str) and name not in run.stages:
            run.stages.append(name)
    run.declared = of(run.config if run.config.get("stages") else run.summary)
    order = {n: i for i, n in enumerate(config_stages(run))}
    run.stages.sort(key=lambda n: order.get(n, len(order)))
    _fill_gaps(run)
    return run


def _ending(run: RunData, run_dir: Path) -> None:
    """How the run stands: whether it lives, how often it began, how it ended."""
    file = run_dir / EXIT_FILE  # none while it runs: whoever begins removes it
    run.living = alive(run_dir) and not file.exists()
    try:
        began = [r for r in read_jsonl(run_dir / ATTEMPTS_FILE) if r.get("event") == "start"]
        run.num_attempts = len(began)
        if file.exists():
            said = _mapping(_json(file), file)
            code = said.get("exit_code")
            run.exit_code = code if isinstance(code, int) else None
            run.reason = str(said.get("reason") or "")
    except DataError as error:
        run.events.append({"event": "damaged", "message": str(error), "time": run.last_time})


def config_stages(run: RunData) -> list[str]:
    """The names of the stages that the config plans."""
    stages = run.config.get("stages")
    found = [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
    return [_effective_name(s) for s in found]


def _effective_name(stage: Mapping[str, Any]) -> str:
    return str(stage.get("name") or stage.get("kind"))


def _collect(run: RunData, records: Iterable[dict[str, Any]]) -> None:
    """Spread the lines of metrics.jsonl over series, without keeping the lines."""
    columns: dict[str, dict[str, tuple[array[int], array[float]]]] = {}
    nonfinite: dict[tuple[str, str], int] = {}
    for record in records:
        run.num_lines += 1
        stage, step, when = str(record.get("stage", "")), record.get("step", 0), record.get("time")
        if isinstance(when, (int, float)):
            run.first_time = when if run.first_time is None else min(run.first_time, when)
            run.last_time = when if run.last_time is None else max(run.last_time, when)
        if record.get("kind") == "event":
            run.events.append(record)
            continue
        table = columns.setdefault(stage, {})
        for name, value in record.items():
            if type(value) is float or type(value) is int:  # not a bool
                if name in _HEAD or not isinstance(step, int):
                    continue
                column = table.get(name)
                if column is None:
                    column = table[name] = (array("q"), array("d"))
                column[0].append(step)
                column[1].append(value)
            elif name.endswith("_nonfinite"):
                plain_name = name.removesuffix("_nonfinite")
                table.setdefault(plain_name, (array("q"), array("d")))
                nonfinite[stage, plain_name] = nonfinite.get((stage, plain_name), 0) + 1
    run.stages = list(columns)
    for stage, table in columns.items():
        for name, (steps, values) in table.items():
            order = np.argsort(np.array(steps, np.int64), kind="stable")
            run.series[stage, name] = Series(
                np.array(steps, np.int64)[order],
                np.array(values, np.float64)[order],
                nonfinite.get((stage, name), 0),
            )


def _fill_gaps(run: RunData) -> None:
    """Take from the metrics what the summary does not say (yet): a run that still goes on."""
    measured = run.metrics(START)
    for metric in {m.name: m for table in run.declared.values() for m in table.values()}.values():
        logged = [(s, series) for s in run.stages if len(series := run.get(s, metric.name))]
        if metric.name in run.summary:
            continue
        if metric.summary == "stages":
            run.summary[metric.name] = {s: float(series.values[-1]) for s, series in logged}
        elif metric.summary == "first" and logged:
            values = logged[0][1].values
            typical = values[-1] if metric.name in measured else np.median(values)
            run.summary[metric.name] = float(typical)
    engine = run.config.get("engine")
    if "layout" not in run.summary and isinstance(engine, dict) and engine.get("layout"):
        run.summary["layout"] = engine["layout"]


def _json(path: Path) -> Any:
    try:
        return safe_files.parse_json(safe_files.read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; delete it or run the stage again") from error


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a mapping, not {type(value).__name__}")
    return value
