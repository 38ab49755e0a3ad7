"""What `shardwise verify` says of each engine: every stage on every layout that it has.

    python benchmarks/engine_parity.py [ENGINE ...] [--stages pretrain,sft] [--whole]

Writes docs/results/engines.json, with the versions, and the table of docs/engines.md, which a test
holds to that file. Engines that are not named keep what the file says of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwise.verify import suite
from shardwise.verify.pool import RankPool
from shardwise.verify.verifier import Verifier

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "results" / "engines.json", DOCS / "engines.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->"
PACKAGES = {"deepspeed": "deepspeed", "megatron": "megatron-core"}
STAGES = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")
LAYOUTS = {
    "deepspeed": (
        "dp1.zero1", "dp2.zero0", "dp2.zero1", "dp2.zero2", "dp2.zero3", "dp4.zero1", "dp4.zero2",
        "dp4.zero3", "zero2.cp2.ulysses", "dp2.zero3.cp2.ring",
    ),
    "megatron": (
        "dp2.zero0", "dp2.zero1", "tp2", "tp2.sp", "pp2", "pp2.v2.interleaved", "dp2.zero1.tp2",
        "tp2.sp.pp2",
    ),
}  # fmt: skip
# The precision in which each is compared: DeepSpeed's masters are fp32 under ZeRO.
PRECISION = {"deepspeed": "fp32", "megatron": "fp64"}


def table(results: dict[str, Any]) -> str:
    """Markdown: layouts by engine and stage, the worst error over its bound, or what failed."""
    lines = ["| engine | stage | layouts | worst error / bound |", "|---|---|---|---|"]
    for engine, found in results.items():
        name = f"{engine} ({found['version']}, {found['precision']})"
        for stage, rows in found["stages"].items():
            wrong = [layout for layout, row in rows.items() if not row["passed"]]
            worst = max(row["worst"] for row in rows.values())
            said = f"differs: {', '.join(wrong)}" if wrong else f"{worst:.2f}"
            lines.append(f"| {name} | {stage} | {' '.join(rows)} | {said} |")
    return "\n".join(lines)


def judge(
    engine: str, stages: Sequence[str], layouts: Sequence[str], pool: RankPool, whole: bool
) -> dict[str, Any]:
    """Verdicts by stage and layout; a verdict's row is printed as it comes."""
    recipe = suite.recipe("llama")
    precision = PRECISION[engine]
    recipe["engine"] = {"kind": engine, "precision": precision}
    if engine == "megatron":
        recipe["engine"]["cpu_shim"] = True
    verifier = Verifier(recipe, pool, whole)
    found: dict[str, Any] = {}
    try:
        for stage in stages:
            for layout in layouts or LAYOUTS[engine]:
                verdict = verifier.check(stage, layout, precision)
                worst = max(
                    (ratio for kind, ratio in verdict.worst.items() if kind != "generated tokens"),
                    default=0.0,
                )
                row = {"passed": verdict.passed, "worst": round(min(worst, 1e9), 3)}
                if not verdict.passed:
                    row["sentence"] = verdict.sentence()
                found.setdefault(stage, {})[layout] = row
                print(engine, stage, layout, row, f"{verdict.seconds:.1f} s", flush=True)
    finally:
        verifier.close()
    version = importlib.metadata.version(PACKAGES[engine])
    return {"version": version, "precision": precision, "whole": whole, "stages": found}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--layouts", help="of one engine: these alone, beside those of the file")
    parser.add_argument("--whole", action="store_true", help="also saves, resumes and generates")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    pool = RankPool()
    try:
        for engine in args.engines:
            layouts = args.layouts.split(",") if args.layouts else ()
            found = judge(engine, args.stages.split(","), layouts, pool, args.whole)
            before = results.get(engine, {}).get("stages", {}) if layouts else {}
            for stage, rows in found["stages"].items():
                found["stages"][stage] = before.get(stage, {}) | rows
            results[engine] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        pool.close()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{before}{BEGIN}{table(results)}\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
