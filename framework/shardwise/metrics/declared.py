"""The declared metrics of a run (see `shardwise.config.metrics`), looked up by stage and name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from shardwise.config import registry
from shardwise.config.metrics import Logs, Metric, Plot, Rule, StageLogs

__all__ = ["Metric", "Plot", "Rule", "Table", "best_of", "generic", "metric_of", "of"]

Table = Mapping[str, Mapping[str, Metric]]  # stage to name to metric
START = "start"  # what ``init_from`` holds is measured under this name


def of(config: Mapping[str, Any]) -> dict[str, dict[str, Metric]]:
    """What every stage of a run logs, its evaluations' figures too.

    ``config``: of a run's folder, or a `RunConfig` as a mapping. Keys are the stages' names, and
    ``start``. Of a kind that is not installed here, what every stage has.
    """
    measured: dict[str, Metric] = {}
    seen: set[str] = set()
    for kind, name, cls in _classes(config, "evaluations", registry.EVALUATION_CONFIGS, Logs):
        # As `stages.pipeline.evaluate_all` names the figures of a kind's further evaluations.
        prefix = f"{name}." if kind in seen else ""
        seen.add(kind)
        measured |= by_name(_prefixed(m, prefix) for m in cls.metrics())
    found = {START: dict(measured)}
    for _, name, cls in _classes(config, "stages", registry.STAGE_CONFIGS, StageLogs):
        found[name] = by_name(cls.metrics()) | measured
    return found


def best_of(config: Mapping[str, Any], stage: str) -> Metric | None:
    """The metric that says which of two models of ``stage`` is better."""
    classes = _classes(config, "stages", registry.STAGE_CONFIGS, StageLogs)
    return next((cls.best() for _, name, cls in classes if name == stage), None)


def metric_of(table: Table, stage: str, name: str) -> Metric:
    """The declaration of a metric, or `generic` where nobody has declared it."""
    return table.get(stage, EVERY).get(name) or generic(name)


def generic(name: str) -> Metric:
    """What can be said of a metric that nobody has declared."""
    words = f"validation {name[4:]}" if name.startswith("val_") else name
    return Metric(name, words.replace("_", " "))


def by_name(metrics: Iterable[Metric]) -> dict[str, Metric]:
    """In order; a later one of the same name takes an earlier one's place."""
    return {m.name: m for m in metrics}


EVERY = by_name(StageLogs.metrics())


def _classes(
    config: Mapping[str, Any], key: str, known: Mapping[str, type[Any]], base: type[Any]
) -> list[tuple[str, str, type[Any]]]:
    """Kind, name and config class of the stages or evaluations that a config lists."""
    registry.discover()
    listed = config.get(key)
    items = [i for i in listed if isinstance(i, dict)] if isinstance(listed, list) else []
    named = [(str(i.get("kind")), str(i.get("name") or i.get("kind"))) for i in items]
    return [(kind, name, known.get(kind, base)) for kind, name in named]


def _prefixed(metric: Metric, prefix: str) -> Metric:
    """A figure of an evaluation whose kind an earlier one has already."""
    if not prefix:
        return metric
    plot = metric.plot and replace(metric.plot, title=f"{metric.plot.title}, {prefix[:-1]}")
    return replace(
        metric,
        name=prefix + metric.name,
        label=f"{metric.label}, {prefix[:-1]}",
        count=metric.count and prefix + metric.count,
        source=metric.source and prefix + metric.source,
        references=tuple(prefix + name for name in metric.references),
        plot=plot,
    )
