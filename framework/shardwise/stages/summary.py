"""summary.json: the figures of a run, gathered from its stages' results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.config.run import RunConfig

# Figures of the whole run, taken from the first stage that measured them.
_FIRST = (
    "val_bits_per_byte",
    "gzip_bits_per_byte",
    "xz_bits_per_byte",
    "val_source",
    "majority_baseline",
    "num_problems",
)


def summarize(
    run: RunConfig,
    results: Sequence[Mapping[str, Any]],
    gemm: Mapping[str, float],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """One flat summary; speed is that of the first stage, whose work is the plainest."""
    summary: dict[str, Any] = {"name": run.name}
    for key in _FIRST:
        for result in results:
            if key in result["metrics"]:
                summary[key] = result["metrics"][key]
                break
    summary["accuracy"] = {
        r["name"]: r["metrics"]["accuracy"] for r in results if "accuracy" in r["metrics"]
    }
    first = results[0]
    summary |= {k: first[k] for k in ("tokens_per_second", "fraction_of_gemm") if k in first}
    precision = run.stages[0].engine.precision
    if precision in gemm:  # absent when a finished stage was not run again
        summary["gemm_gflops"] = gemm[precision] / 1e9
    summary["layout"] = first["layout"]
    summary["samples"] = [s for r in results for s in r["metrics"].get("samples", [])]
    summary["skipped_updates"] = {r["name"]: n for r in results if (n := r.get("skipped", 0))}
    summary["tokens"] = {r["name"]: r["tokens"] for r in results}
    summary["stages"] = [_without_samples(r) for r in results]
    summary["machine"] = dict(machine)
    return summary


def _without_samples(result: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {k: v for k, v in result["metrics"].items() if k != "samples"}
    return {**result, "metrics": metrics}
