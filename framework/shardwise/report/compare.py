"""Several runs side by side: curves overlaid, figures with intervals, configs, endings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardwise.config.differences import differences, leaves
from shardwise.config.redact import redact, redact_data
from shardwise.errors import DataError, UserError
from shardwise.metrics.declared import EVERY, START, Metric
from shardwise.metrics.progress import duration, written
from shardwise.report.charts import PALETTE, SMOOTH_FROM, Chart, Key, axes, curve, how_drawn
from shardwise.report.page import diagnoses, ending, state
from shardwise.report.rundata import NoRunError, RunData, load_run
from shardwise.report.series import Series, t_interval, wilson
from shardwise.report.summary import num, sample_size, stage_table

_DASHES = ("solid", "dash", "dot")
_FAINT = 3  # runs up to which every point is drawn behind its running mean
SAME = frozenset({"seed", "name", "run_dir"})  # keys in which repeats of one run may differ
TAIL = 20  # the final figure of a curve of as many points is the mean of its last 20th
WALL = Metric("wall_seconds", "wall time", better="lower", format="duration")


@dataclass(frozen=True)
class Side:
    """One run of a comparison. ``error``: why there is nothing in ``run``."""

    folder: Path
    run: RunData
    label: str = ""
    color: str = ""
    dash: str = "solid"
    error: str = ""


def load(folders: Sequence[Path | str]) -> list[Side]:
    """The runs, each with a name of its own and a line of its own.

    Raises UserError when one is named twice, or when it is no run; DataError when none of them can
    be read. One that is damaged says so itself.
    """
    sides: list[Side] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name one that `shardwise train` wrote")
        if any(side.folder == folder.resolve() for side in sides):
            raise UserError(f"{folder} is named twice; name each run once")
        try:
            side = Side(folder.resolve(), load_run(folder))
        except NoRunError:
            raise
        except UserError as error:  # a damaged one
            side = Side(folder.resolve(), RunData(folder.name), error=redact(str(error)))
        sides.append(side)
    if sides and all(side.error for side in sides):
        raise DataError(sides[0].error)
    names = _labels(sides)
    return [
        replace(
            side,
            label=redact(name),
            color=PALETTE[i % len(PALETTE)],
            dash=_DASHES[i // len(PALETTE) % len(_DASHES)],
        )
        for i, (side, name) in enumerate(zip(sides, names, strict=True))
    ]


def _labels(sides: Sequence[Side]) -> list[str]:
    """The runs' names; where two have one, as much of their paths as tells all apart."""
    names = [side.run.name for side in sides]
    depth = 0
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(side.folder.parts[-depth:]) for side in sides]
    return names


def repeats(sides: Sequence[Side]) -> list[list[Side]]:
    """The runs in groups whose recipes differ by nothing but the seed."""
    groups: dict[str, list[Side]] = {}
    for side in sides:
        told = {k: v for k, v in leaves(side.run.config) if k not in SAME}
        key = json.dumps(told, sort_keys=True, default=str) if told else side.label
        groups.setdefault(key, []).append(side)
    return list(groups.values())


# --- curves -------------------------------------------------------------------------------------


def overlay(
    title: str, metric: Metric, curves: Sequence[tuple[Side, Series]], legend: bool = False
) -> Chart:
    """One metric of several runs in one chart, each in its run's colour and dash."""
    plot = metric.plot
    chart = Chart(title, plot.group if plot else "", layout=axes("step", metric.unit))
    if plot and plot.log and all(s.values.min() > 0 for _, s in curves):
        chart.layout["yaxis"] |= {"type": "log"}
    for side, series in curves:
        marks = len(series) < SMOOTH_FROM
        traces = curve(series, side.color, marks=marks, exact=bool(plot and plot.exact))
        if len(curves) > _FAINT and not marks:
            traces = traces[-1:]
        traces[-1] |= {"name": side.label}
        traces[-1]["line"] = traces[-1]["line"] | {"dash": side.dash}
        chart.traces += traces
        if legend:
            chart.legend.append(Key(side.label, side.color, side.dash))
    chart.caption = how_drawn([s for _, s in curves]) if len(curves) <= _FAINT else ""
    return chart


def overlays(sides: Sequence[Side]) -> list[Chart]:
    """A chart for each stage and metric with one of its own that some run has two points of."""
    found = []
    stages = dict.fromkeys(stage for side in sides for stage in side.run.stages)
    for stage in stages:
        metrics = {n: m for side in sides for n, m in side.run.metrics(stage).items() if m.plot}
        for name, metric in metrics.items():
            curves = [(side, s) for side in sides if len(s := side.run.get(stage, name))]
            if any(len(series) > 1 for _, series in curves):
                title = f"{metric.label[0].upper()}{metric.label[1:]}, {stage}"
                found.append(overlay(title, metric, curves))
    common = [m.plot.group for m in EVERY.values() if m.plot]
    order = {group: i for i, group in enumerate(dict.fromkeys(common))}
    return sorted(found, key=lambda chart: order.get(chart.group, -1))


# --- figures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A figure of a run, or the mean over its repeats. ``low`` to ``high``: a 95 % interval.

    ``best``: none is better; ``close``: its interval reaches into that of the best.
    """

    value: float
    text: str
    interval: str = ""
    low: float | None = None
    high: float | None = None
    runs: int = 1
    best: bool = False
    close: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure of all of them; None where a run does not have it."""

    metric: Metric
    stage: str
    label: str
    cells: list[Cell | None]


Reads = Callable[[RunData], float | None]


def figures(groups: Sequence[Sequence[Side]]) -> list[Figure]:
    """Every figure that some run has: what was measured, how the stages ended, how fast."""
    runs = [side.run for group in groups for side in group]
    found: list[tuple[Metric, str, Reads]] = []
    for metric in {n: m for run in runs for n, m in run.metrics(START).items()}.values():
        if metric.summary == "first" and metric.better:
            found.append((metric, "", _from_summary(metric.name)))
        elif metric.summary == "stages":
            tables = [dict(stage_table(run.summary, metric.name)) for run in runs]
            names = dict.fromkeys(stage for table in tables for stage in table)
            found += [(metric, stage, _after(metric.name, stage)) for stage in names]
    for stage in dict.fromkeys(stage for run in runs for stage in run.stages):
        ends = {n: m for run in runs for n, m in run.metrics(stage).items() if m.figure}
        found += [(m, stage, _last(m.name, stage)) for m in ends.values()]
    speeds = [m for m in EVERY.values() if m.summary == "first"]
    found += [(m, "", _from_summary(m.name)) for m in (*speeds, WALL)]
    out = []
    for metric, stage, read in found:
        cells = [_cell(metric, [side.run for side in group], read) for group in groups]
        if any(cells):
            label = f"{metric.label}, {stage}" if stage else metric.label
            out.append(Figure(metric, stage, label, _ranked(metric, cells)))
    return out


def _from_summary(name: str) -> Reads:
    return lambda run: num(run.summary.get(name))


def _after(name: str, stage: str) -> Reads:
    return lambda run: dict(stage_table(run.summary, name)).get(stage)


def _last(name: str, stage: str) -> Reads:
    """Of a noisy curve the mean of its end."""

    def read(run: RunData) -> float | None:
        values = run.get(stage, name).values
        return float(values[-max(1, len(values) // TAIL) :].mean()) if len(values) else None

    return read


def _cell(metric: Metric, runs: Sequence[RunData], read: Reads) -> Cell | None:
    known = [(run, value) for run in runs if (value := read(run)) is not None]
    if not known:
        return None
    mean, half = t_interval([value for _, value in known])
    trials = [sample_size(run.summary, metric) or 0 for run, _ in known]
    spread = half is not None and half > 1e-9 * abs(mean)  # more than rounding
    bounds = (mean - half, mean + half) if spread and half is not None else None
    if not spread and all(trials) and 0.0 <= mean <= 1.0:  # equal shares too: all their problems
        bounds = wilson(mean, sum(trials))
    cell = Cell(mean, _text(metric, mean), runs=len(known))
    if bounds is None:
        return cell
    said = " to ".join(_text(metric, bound) for bound in bounds)
    return replace(cell, interval=said, low=bounds[0], high=bounds[1])


def _text(metric: Metric, value: float) -> str:
    return duration(value) if metric is WALL else written(metric, value)


def _ranked(metric: Metric, cells: Sequence[Cell | None]) -> list[Cell | None]:
    """With the best marked, and those that chance may have put behind it."""
    known = [cell for cell in cells if cell is not None]
    if metric.better is None or len({cell.value for cell in known}) < 2:
        return list(cells)
    pick = min if metric.better == "lower" else max
    top = pick(known, key=lambda cell: cell.value)

    def marked(cell: Cell) -> Cell:
        best = cell.value == top.value
        near = _low(cell) <= _high(top) and _low(top) <= _high(cell)
        return replace(cell, best=best, close=not best and near)

    return [cell and marked(cell) for cell in cells]


def _low(cell: Cell) -> float:
    return cell.value if cell.low is None else cell.low


def _high(cell: Cell) -> float:
    return cell.value if cell.high is None else cell.high


# --- what is said of them -----------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """How one run stands."""

    side: Side
    state: str
    steps: str
    attempts: int
    words: str
    findings: list[str]


def endings(sides: Sequence[Side]) -> list[Ending]:
    """How each run stands, how it ended, and what the diagnosis has found."""
    out = []
    for side in sides:
        run = side.run
        if side.error:
            out.append(Ending(side, "unreadable", "", 0, side.error, []))
            continue
        findings = [f"{d.stage} · {c.rule}" for d in diagnoses(run) for c in d.found]
        words = ending(run) if run.exit_code else ""
        if (skipped := run.summary.get("skipped_updates")) and isinstance(skipped, dict):
            words += "; " * bool(words) + ", ".join(f"{s}: {n} skipped" for s, n in skipped.items())
        steps = ", ".join(f"{name} {done:,}" for name, done in _steps(run).items())
        out.append(Ending(side, state(run), steps, run.num_attempts, words, findings))
    return out


def _steps(run: RunData) -> dict[str, int]:
    """The newest step of each stage that has begun."""
    found: dict[str, int] = {}
    for (stage, _), series in run.series.items():
        if len(series) and stage in run.stages:
            found[stage] = max(found.get(stage, 0), int(series.steps[-1]))
    return {stage: found[stage] for stage in run.stages if stage in found}


def config_differences(sides: Sequence[Side]) -> dict[str, tuple[Any, ...]]:
    """The keys in which the resolved recipes differ, but for names and folders."""
    shown = [dict(leaves(redact_data(side.run.config))) for side in sides if side.run.config]
    return {k: v for k, v in differences(*shown).items() if k not in ("name", "run_dir")}


def _group_label(group: Sequence[Side]) -> str:
    more = f" and {len(group) - 3} more" if len(group) > 3 else ""
    return ", ".join(side.label for side in group[:3]) + more


def lede(sides: Sequence[Side], groups: Sequence[Sequence[Side]]) -> str:
    """The comparison in one line."""
    keys = [k for k in config_differences(sides) if k != "seed"]
    text = f"{len(sides)} runs"
    if len(groups) < len(sides):
        text += f" of {len(groups)} recipe{'s' if len(groups) > 1 else ''}, some by several seeds"
    if any(not side.run.config for side in sides):
        return f"{text}; not every one has a config to compare."
    if not keys:
        return (
            f"{text}; their recipes differ in nothing{' but the seed' if len(sides) > 1 else ''}."
        )
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{text}; their recipes differ in {', '.join(keys[:3])}{more}."


def view(sides: Sequence[Side]) -> dict[str, Any]:
    """What the template shows, except the charts."""
    groups = repeats(sides)
    table = figures(groups)
    with_config = [side for side in sides if side.run.config]
    changed = config_differences(sides)
    return {
        "sides": sides,
        "lede": lede(sides, groups),
        "figures": table,
        "groups_of_runs": [(_group_label(group), len(group)) for group in groups],
        "repeated": any(len(group) > 1 for group in groups),
        "endings": endings(sides),
        "with_config": with_config,
        "differences": [
            (key, [json.dumps(v, ensure_ascii=False) if v is not None else "" for v in values])
            for key, values in changed.items()
        ],
        "keys": [Key(side.label, side.color, side.dash) for side in sides],
    }


def data(sides: Sequence[Side]) -> dict[str, Any]:
    """The same as plain data, for ``--json``."""
    groups = repeats(sides)
    with_config = [side.label for side in sides if side.run.config]
    return {
        "runs": [
            {
                "label": e.side.label,
                "folder": str(e.side.folder),
                "state": e.state,
                "steps": _steps(e.side.run),
                "attempts": e.attempts,
                "exit_code": e.side.run.exit_code,
                "ending": e.words,
                "findings": e.findings,
            }
            for e in endings(sides)
        ],
        "groups": [[side.label for side in group] for group in groups],
        "figures": [
            {
                "metric": c.metric.name,
                "stage": c.stage,
                "label": c.label,
                "unit": c.metric.unit,
                "better": c.metric.better,
                "of_groups": [
                    cell and {"value": cell.value, "low": cell.low, "high": cell.high,
                              "runs": cell.runs, "best": cell.best, "close": cell.close}
                    for cell in c.cells
                ],
            }
            for c in figures(groups)
        ],
        "differences": {
            key: dict(zip(with_config, values, strict=True))
            for key, values in config_differences(sides).items()
        },
    }  # fmt: skip
