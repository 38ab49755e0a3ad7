"""summary.json: the figures of a run, gathered from its stages' results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.config.run import RunConfig
from shardwise.metrics import declared


def summarize(
    run: RunConfig,
    results: Sequence[Mapping[str, Any]],
    gemm: Mapping[str, float],
    machine: Mapping[str, Any],
    start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One flat summary; speed is that of the first stage, whose work is the plainest.

    What else is in it, the metrics' declarations say. ``start``: what was measured before.
    """
    summary: dict[str, Any] = {"name": run.name}
    first = next((r for r in results if "layout" in r), results[0])  # the first that trains
    table = declared.of(run.model_dump(mode="json"))
    # A job's figures are of its own problems: no evaluation's, though they may share a name.
    trained = [r for r in results if "checkpoint" in r]
    measured = [r["metrics"] for r in trained]
    for name, metric in table[declared.START].items():
        if metric.summary == "first":
            for key in filter(None, (name, metric.source)):
                summary |= next(({key: m[key]} for m in measured if key in m), {})
        elif metric.summary == "stages":
            before = {declared.START: start[name]} if start and name in start else {}
            after = {r["name"]: r["metrics"][name] for r in trained if name in r["metrics"]}
            summary[name] = before | after
    of_first = [n for n, m in table[first["name"]].items() if m.summary == "first"]
    summary |= {name: first[name] for name in of_first if name in first}
    precision = (run.training or run.stages)[0].engine.precision
    if precision in gemm:  # absent when a finished stage was not run again
        summary["gemm_gflops"] = gemm[precision] / 1e9
    summary["layout"] = first.get("layout", "")
    summary["samples"] = [s for r in results for s in r["metrics"].get("samples", [])]
    summary["skipped_updates"] = {r["name"]: n for r in results if (n := r.get("skipped", 0))}
    summary["tokens"] = {r["name"]: r["tokens"] for r in results if "tokens" in r}
    summary["stages"] = [_without_samples(r) for r in results]
    summary["evaluations"] = [{"kind": e.kind, "name": e.name} for e in run.evaluations]
    summary["machine"] = dict(machine)
    return summary


def _without_samples(result: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {k: v for k, v in result["metrics"].items() if k != "samples"}
    return {**result, "metrics": metrics}
