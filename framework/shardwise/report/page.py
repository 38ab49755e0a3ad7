"""What the page says, as plain values for the template: verdict, tiles, samples, lineage."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardwise.config.redact import redact
from shardwise.errors import EXIT_CODES
from shardwise.metrics.declared import START, Metric
from shardwise.metrics.progress import duration, number, written
from shardwise.metrics.writers import LEFT_OUT
from shardwise.report.diagnosis import Check, diagnose
from shardwise.report.jobs import jobs, metric_text
from shardwise.report.rundata import RunData, config_stages, summary_stages
from shardwise.report.series import Series, wilson
from shardwise.report.summary import (
    against,
    artifacts_of,
    gemm_rate,
    interval,
    num,
    sample_size,
    stage_figures,
    stage_table,
)

MAX_EVENTS = 200


@dataclass(frozen=True)
class Tile:
    """One figure, with what it is to be compared with."""

    label: str
    value: str
    notes: tuple[str, ...] = ()


def is_finished(run: RunData) -> bool:
    """Whether every stage of the config is in the summary."""
    done = {s.get("name") for s in summary_stages(run.summary)}
    # What the metrics also hold may be no stage of it: the figures of the start.
    planned = config_stages(run) or run.stages
    return bool(done) and all(stage in done for stage in planned)


def _steps(run: RunData, stage: str) -> tuple[int, int | None]:
    """Steps done, and steps planned where the config says."""
    done = [int(s.steps[-1]) for (name, _), s in run.series.items() if name == stage and len(s)]
    planned = run.stage_config(stage).get("steps")
    return max(done, default=0), planned if isinstance(planned, int) else None


def _lift(run: RunData, metric: Metric) -> str:
    """What the last stage did to a figure, and whether chance could have done it."""
    rows = stage_table(run.summary, metric.name)
    if len(rows) < 2:
        return ""
    before, after = (f"{v:.2f}" if metric.count else written(metric, v) for _, v in rows[-2:])
    text = f"{metric.label} went from {before} ({rows[-2][0]}) to {after} ({rows[-1][0]})"
    n, low, high = sample_size(run.summary, metric), rows[-2][1], rows[-1][1]
    if n and 0 <= low < high <= 1:
        apart = wilson(high, n)[0] > wilson(low, n)[1]
        text += (
            f" on {n} {run.metric(START, metric.count).label}; the 95% intervals "
            f"{'do not overlap' if apart else 'overlap, so it may be chance'}"
        )
    return text


def _measured(run: RunData, metric: Metric) -> str:
    """A figure of the run in words."""
    value = num(run.summary.get(metric.name))
    if value is None or not metric.better:  # what others are held against
        return ""
    text = f"{metric.label} {written(metric, value)}"
    text += f" ({source})" if (source := run.summary.get(metric.source)) else ""
    return ", ".join([text, *against(run.summary, metric, value, run.declared)[:1]])


def ending(run: RunData) -> str:
    """How a run ended, with its exit code, in words."""
    meaning = EXIT_CODES.get(str(run.exit_code), "").partition(":")[0]
    reason = redact(run.reason).rstrip(".")
    words = [f"exit code {run.exit_code}"] + ([f"({meaning})"] if meaning else [])
    return " ".join(words) + (f": {reason}" if reason else "")


def state(run: RunData) -> str:
    """Of a run in one word or two."""
    if run.living:
        return "training"
    return "finished" if is_finished(run) and not run.exit_code else "not finished"


def verdict(run: RunData) -> str:
    """The run in one line."""
    parts = []
    if not is_finished(run):
        reached = [s for s in run.stages if _steps(run, s)[0]]
        if reached:
            done, planned = _steps(run, reached[-1])
            of = f" of {planned}" if planned else ""
            how = "Training" if run.living else "Not finished"
            parts.append(f"{how}: {reached[-1]} at step {done}{of}")
        else:
            parts.append("Not started: no step is logged yet")
    if run.exit_code:
        parts.append(f"Ended with {ending(run)}")
    said = {"first": _measured, "stages": _lift}
    measured = [m for m in run.metrics(START).values() if m.summary]
    found = [text for m in measured if (text := said[m.summary](run, m))]
    found = found or [f"{name}: {text}" for name, text in stage_figures(run.summary)]
    parts += found
    return ". ".join(part[0].upper() + part[1:] for part in parts or ["Finished"]) + "."


def _model_notes(run: RunData) -> tuple[str, ...]:
    """Family and precision, as the config has them."""
    notes = []
    for section, key in (("model", "family"), ("engine", "precision")):
        part = run.config.get(section)
        if isinstance(part, dict) and part.get(key):
            notes.append(f"{key} {part[key]}")
    return tuple(notes)


def _measured_tile(run: RunData, metric: Metric) -> list[Tile]:
    """What an evaluation found: once in a run, or after each stage."""
    s, n = run.summary, sample_size(run.summary, metric)
    label = metric.label[0].upper() + metric.label[1:]
    if metric.summary == "stages":
        if not (rows := stage_table(s, metric.name)):
            return []
        value, shown = rows[-1][1], f"{rows[-1][1]:.1%}" if metric.count else ""
        notes = [f"{name} {written(metric, v)} {interval(v, n)}" for name, v in rows]
        label += f", {n} {run.metric(START, metric.count).label}" if n else ""
    else:
        if (found := num(s.get(metric.name))) is None:
            return []
        value, shown = found, ""
        notes = [redact(str(s[metric.source]))] if s.get(metric.source) else []
    notes += against(s, metric, value, run.declared)
    return [Tile(label, shown or written(metric, value), tuple(notes))]


def tiles(run: RunData) -> list[Tile]:
    """The figures at the head of the page; those that are not known are left out."""
    s, out = run.summary, []
    for metric in run.metrics(START).values():
        if metric.better and metric.summary:
            out += _measured_tile(run, metric)
    if (tokens := num(s.get("tokens_per_second"))) is not None:
        pace = [(stage, run.get(stage, "tokens_per_second")) for stage in run.stages]
        notes = [f"{st} {number(float(np.median(x.values)))}" for st, x in pace if len(x)]
        out.append(Tile("Training speed", f"{number(tokens)} tok/s", tuple(notes)))
    if (fraction := num(s.get("fraction_of_gemm"))) is not None:
        rate = num(s.get("gemm_gflops"))
        notes = [f"of {gemm_rate(rate)}, measured in this run"] if rate else []
        out.append(Tile("Fraction of GEMM rate", f"{fraction:.0%}", tuple(notes)))
    layouts = {
        str(x.get("name") or x.get("kind") or "?"): str(x["layout"])
        for x in summary_stages(s)
        if x.get("layout")
    }
    if len(set(layouts.values())) > 1:
        notes = [f"{stage} {layout}" for stage, layout in layouts.items()]
        moved = f"{len(set(layouts.values()))} layouts"
        out.append(Tile("Layout", moved, (*notes, *_model_notes(run))))
    elif s.get("layout"):
        out.append(Tile("Layout", str(s["layout"]), _model_notes(run)))
    wall = num(s.get("wall_seconds"))
    if wall is None and run.first_time is not None and run.last_time is not None:
        out.append(Tile("Time so far", duration(run.last_time - run.first_time)))
    elif wall is not None:
        total = sum(num(x.get("tokens")) or 0.0 for x in summary_stages(s))
        notes = [f"{number(total)} tokens in all"] if total else []
        # Another start of the same run finds its stages done, or half done.
        starts = sum(e.get("event") == "started" for e in run.events)
        label = "Wall time" if starts < 2 else f"Wall time, the last of {starts} starts"
        out.append(Tile(label, duration(wall), tuple(notes)))
    return out


@dataclass(frozen=True)
class Sample:
    """What one stage's model wrote."""

    stage: str
    completion: str
    correct: bool | None


@dataclass
class SampleGroup:
    """One prompt and what the model wrote after each stage."""

    prompt: str
    answer: str | None
    samples: list[Sample]


def sample_groups(run: RunData) -> tuple[list[SampleGroup], list[SampleGroup]]:
    """Problems (with a known answer) and free continuations, grouped by prompt."""
    groups: dict[tuple[str, str | None], SampleGroup] = {}
    rows = run.summary.get("samples")
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict):
            continue
        prompt = redact(str(row.get("prompt") or ""))
        answer = None if row.get("answer") is None else str(row["answer"])
        correct = row.get("correct")
        sample = Sample(
            str(row.get("stage") or "?"),
            redact(str(row.get("completion") or "")),
            correct if isinstance(correct, bool) else None,
        )
        groups.setdefault((prompt, answer), SampleGroup(prompt, answer, [])).samples.append(sample)
    found = list(groups.values())
    return [g for g in found if g.answer is not None], [g for g in found if g.answer is None]


@dataclass(frozen=True)
class Link:
    """A stage in the lineage. ``chained``: whether its parent is the stage before, if known."""

    name: str
    kind: str
    done: bool
    facts: tuple[tuple[str, str], ...]
    hashes: tuple[tuple[str, str], ...]
    checkpoint: str


def lineage(run: RunData) -> list[Link]:
    """Every stage with what made it: config, data and parent hashes, layout, steps."""
    links = []
    for stage in run.stages:
        row, config = run.stage_summary(stage), run.stage_config(stage)
        done, planned = _steps(run, stage)
        facts = []
        steps = num(row.get("steps"))
        if steps is not None:
            facts.append(("steps", f"{int(steps):,}"))
        elif done or planned:
            facts.append(("steps", f"{done:,} of {planned:,}" if planned else f"{done:,}"))
        if (tokens := num(row.get("tokens"))) is not None:
            facts.append(("tokens", number(tokens)))
        if (seconds := num(row.get("seconds"))) is not None:
            facts.append(("time", duration(seconds)))
        if row.get("layout"):
            facts.append(("layout", str(row["layout"])))
        metrics = {} if artifacts_of(row) else row.get("metrics")  # a job's have a table
        for name, value in metrics.items() if isinstance(metrics, dict) else []:
            if (figure := num(value)) is not None and len(facts) < 10:
                metric = run.metric(stage, name)
                facts.append((metric.label, metric_text(metric, figure)))
        hashes = [
            (label, str(row[key]))
            for label, key in (
                ("parent", "parent_hash"),
                ("config", "config_hash"),
                ("data", "data_hash"),
                ("checkpoint", "checkpoint_hash"),
            )
            if row.get(key)
        ]
        inputs = row.get("inputs")
        read = inputs.items() if isinstance(inputs, dict) else ()
        hashes += [(str(name), str(value)) for name, value in read]
        kind = str(row.get("kind") or config.get("kind") or stage)
        path = str(row.get("checkpoint") or "")
        path = path[max(path.find("stages/"), 0) :]  # within the run
        links.append(Link(stage, kind, bool(row), tuple(facts), tuple(hashes), path))
    return links


def origin(run: RunData) -> str:
    """What the first stage started from."""
    if run.config.get("init_from"):
        return redact(str(run.config["init_from"]))
    seed = run.config.get("seed")
    return "random weights" + (f", seed {seed}" if isinstance(seed, int) else "")


@dataclass(frozen=True)
class Event:
    """A line of the list of events."""

    when: str
    stage: str
    step: str
    event: str
    message: str


def events(run: RunData) -> tuple[list[Event], int]:
    """The newest `MAX_EVENTS` events, oldest first, and how many there are in all."""
    out = []
    rows = [row for row in run.events if row.get("event") != LEFT_OUT]  # a line of its own
    for row in rows[-MAX_EVENTS:]:
        when = num(row.get("time"))
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when)) if when else ""
        message = redact(str(row.get("message") or ""))
        stage, step = str(row.get("stage") or ""), row.get("step")
        shown = "" if step is None or not stage else str(step)
        out.append(Event(stamp, stage, shown, str(row.get("event") or "event"), message))
    return out, len(rows)


def left_out(run: RunData) -> list[tuple[str, str]]:
    """Stages that left out rows of their files, and which: counts by reason, each with a place."""
    said = {str(e.get("stage")): e.get("message") for e in run.events if e.get("event") == LEFT_OUT}
    return [(stage, redact(str(words))) for stage, words in said.items()]


def machine(run: RunData) -> list[tuple[str, str]]:
    """The machine, as (name, value) rows."""
    info = run.summary.get("machine")
    rows = []
    for key, value in info.items() if isinstance(info, dict) else []:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if value not in (None, "", [], {}):
            label = str(key).removeprefix("num_").replace("_gb", " (GB)").replace("_", " ")
            rows.append((label, redact(text)))
    return rows


@dataclass(frozen=True)
class Fp8Layer:
    """What the sentinel saw of one quantised layer: its worst look, and whether it fell back."""

    stage: str
    layer: str
    looks: int
    error: float
    underflow: float
    overflow: float
    drift: float | None
    fell: str


def fp8_layers(run: RunData) -> list[Fp8Layer]:
    """Every layer that the sentinel looked at, the worst error of a stage first."""
    fell = {
        (str(e.get("stage")), str(e.get("message")).split(" ", 1)[0]): f"at step {e.get('step')}"
        for e in run.events
        if e.get("event") == "fp8_fallback"
    }
    out = []
    for stage in run.stages:
        # `fp8.<layer>.<figure>`, as `shardwise.precision.sentinel` names them.
        errors = [n for n in run.names(stage) if n.startswith("fp8.") and n.endswith(".error")]
        rows = []
        for path in (n.removesuffix(".error") for n in errors):
            error, underflow, overflow, drift = (
                _furthest(run.get(stage, f"{path}.{figure}"))
                for figure in ("error", "underflow", "overflow", "drift")
            )
            layer = path.removeprefix("fp8.")
            looks = len(run.get(stage, f"{path}.error"))
            rows.append(
                Fp8Layer(
                    stage,
                    layer,
                    looks,
                    error or 0.0,
                    underflow or 0.0,
                    overflow or 0.0,
                    drift,
                    fell.get((stage, layer), ""),
                )
            )
        out += sorted(rows, key=lambda row: (not row.fell, -row.error))
    return out


def _furthest(series: Series) -> float | None:
    """The value furthest from 0, with its sign; None of an empty series."""
    return float(max(series.values, key=abs)) if len(series) else None


@dataclass(frozen=True)
class Diagnosis:
    """All rules' answers for one stage."""

    stage: str
    checks: list[Check]

    @property
    def found(self) -> list[Check]:
        """The rules that found something."""
        return [c for c in self.checks if c.status == "found"]


def _seen(run: RunData, stage: str, name: str) -> Series:
    """A stage's series; of an evaluation's, with what the stage started from in front."""
    series = run.get(stage, name)
    if name not in run.metrics(START) or not len(series):
        return series
    said = run.stage_config(stage).get("start_from")
    earlier = [*reversed(run.stages[: run.stages.index(stage)]), START]
    for other in [str(said)] if said else earlier:
        if len(before := run.get(other, name)):
            return Series(
                np.concatenate([[0], series.steps]),
                np.concatenate([before.values[-1:], series.values]),
            )
    return series


def diagnoses(run: RunData) -> list[Diagnosis]:
    """Every stage through every rule that watches its metrics."""
    out = []
    for stage in run.stages:
        checks = diagnose(run.metrics(stage).values(), functools.partial(_seen, run, stage))
        if checks:
            out.append(Diagnosis(stage, checks))
    return out


def view(run: RunData) -> dict[str, Any]:
    """Everything the template shows except the charts."""
    problems, texts = sample_groups(run)
    shown, num_events = events(run)
    return {
        "name": run.name,
        "state": state(run),
        "verdict": verdict(run),
        "tiles": tiles(run),
        "problems": problems,
        "texts": texts,
        "origin": origin(run),
        "jobs": jobs(run),
        "lineage": lineage(run),
        "left_out": left_out(run),
        "events": shown,
        "num_events": num_events,
        "machine": machine(run),
        "diagnoses": diagnoses(run),
        "fp8_layers": fp8_layers(run),
        "config": redact(run.config_text),
        "num_lines": run.num_lines,
    }
