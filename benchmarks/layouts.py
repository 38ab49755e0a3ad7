"""Layouts of two single-threaded ranks beside one process with two threads, and their memory.

    python benchmarks/layouts.py [--compile] [--profile] [--layouts dp2.zero1 ...]

A llama of 110M parameters, bf16 (fp32 where the processor has no bf16 products), AdamW, clipping,
8 x 512 tokens a step on both sides. Both live in one process tree and take turns (A B A B ...);
who waits is blocked on a pipe and burns nothing. Compiling and warm-up are not counted. The ratio
is tokens/s of the layout over tokens/s of the one process. What other processes burnt during the
turns is read from /proc/stat: more than a tenth of a core, and the ratio is rejected.

Then each layout's memory by category, measured on the live tensors of one eager step
(`occupancy.py`), against the formulas of `shardwise.memory`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from common import table, verdict
from occupancy import error, formula, measure
from peers.handwritten import Shape

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.metrics.gemm import measure_gemm
from shardwise.metrics.timing import Laps, Neighbours, load
from shardwise.models.dense.llama import LlamaConfig
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh, init_distributed
from shardwise.precision.policy import precision_of
from shardwise.verify.pool import RankPool

SHAPES = {
    "tiny": Shape("tiny", 512, 64, 4, 4, 2, 128, 8, 32),
    # Depth and feed-forward as one would choose them for two pipeline stages: eight layers weigh
    # as much as five and the head.
    "110M": Shape("110M", 32000, 768, 13, 12, 12, 1792, 8, 512),
}
ALONE = "dp1.zero0"
TARGETS = {"dp2.zero1": 0.93, "dp2.zero3": 0.90, "tp2.sp": 0.90}
TARGETS |= dict.fromkeys(("pp2", "pp2.interleaved.v2", "pp2.zbv"), 0.88)
PIPELINE_MICROBATCHES = 8
MEMORY_TARGET = 0.05
LR = 3e-4


@dataclasses.dataclass(frozen=True)
class Side:
    """One contestant: a layout on ``world`` processes of ``threads`` threads."""

    layout: str
    world: int
    threads: int
    precision: Any = "auto"

    @property
    def micro_batches(self) -> int:
        """Into how many a data rank cuts its rows: a pipeline needs some, nobody else any."""
        return PIPELINE_MICROBATCHES if "pp" in self.layout else 1


# --- inside the rank processes ------------------------------------------------------------------

_ENGINES: dict[str, tuple[NativeEngine, list[MicroBatch]]] = {}


def build(side: Side, shape: Shape, compile: bool) -> NativeEngine:
    """This rank's engine."""
    model = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        ffn_size=shape.ffn_size,
        max_seq_len=shape.seq_len,
    )
    torch.set_num_threads(side.threads)
    init_distributed(
        torch.device("cpu")
    )  # the pool has made the process group; the rest as in a run
    mesh = build_mesh(parse_layout(side.layout, side.world), torch.device("cpu"))
    config = NativeConfig(
        layout=side.layout, precision=side.precision, compile=compile, device="cpu"
    )
    return NativeEngine(model, config, mesh, seed=0, optimizer=AdamWConfig(lr=LR))


def rows_of(engine: NativeEngine, side: Side, shape: Shape) -> list[MicroBatch]:
    """This rank's slice of a fixed global batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (shape.batch, shape.seq_len + 1), generator=generator)
    batch = MicroBatch(
        input_ids_BT=tokens[:, :-1].contiguous(),
        position_ids_BT=torch.arange(shape.seq_len).expand(shape.batch, -1).contiguous(),
        targets_BT=tokens[:, 1:].contiguous(),
        loss_mask_BT=torch.ones(shape.batch, shape.seq_len, dtype=torch.bool),
        sample_ids_B=torch.arange(shape.batch),
    )
    share = shape.batch // engine.data_size
    mine = slice(engine.data_rank * share, (engine.data_rank + 1) * share)
    return batch.map(lambda t: t[mine]).split(share // side.micro_batches)


def enter(side: Side, shape: Shape, compile: bool) -> None:
    """Build the engine that the next turns are about; an earlier one is dropped."""
    _ENGINES.clear()
    torch.compiler.reset()  # an earlier engine's shapes would make these dynamic
    engine = build(side, shape, compile)
    _ENGINES[side.layout] = engine, rows_of(engine, side, shape)


def turn(side: Side, steps: int) -> tuple[float, float, float]:
    """Wall seconds and processor seconds of ``steps`` steps on this rank, and the last loss."""
    engine, batches = _ENGINES[side.layout]
    dist.barrier()
    burnt, began = time.process_time(), time.perf_counter()
    for _ in range(steps):
        metrics = engine.forward_backward(batches, CausalLM())
        engine.step(LR)
    dist.barrier()
    return time.perf_counter() - began, time.process_time() - burnt, metrics["loss"]


def gemm(side: Side, budget_s: float) -> float:
    """FLOP/s of products in the engine's dtype on this rank's threads, as its peers do the same."""
    torch.set_num_threads(side.threads)
    dist.barrier()
    dtype = precision_of(side.precision, torch.device("cpu")).compute
    return measure_gemm(dtype, budget_s=budget_s).flops


def top_operators(side: Side, steps: int, rows: int = 15) -> str:
    """torch.profiler's table of a few steps: operators by their own processor time."""
    from torch.profiler import ProfilerActivity, profile

    turn(side, 1)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        wall, _, _ = turn(side, steps)
    events = sorted(prof.key_averages(), key=lambda e: -e.self_cpu_time_total)
    inside = sum(e.self_cpu_time_total for e in events) / 1e6
    cells = [["outside of operators", "", wall - inside]]
    cells += [[e.key[:60], e.count // steps, e.self_cpu_time_total / 1e6] for e in events[:rows]]
    lines = [[n, c, f"{1e3 * s / steps:.1f}", f"{s / wall:.1%}"] for n, c, s in cells]
    return table(["", "calls/step", "ms/step", "share"], lines)


def memory_of(side: Side, shape: Shape) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by category on this rank: measured, and by the formulas."""
    _ENGINES.clear()
    engine = build(side, shape, compile=False)
    batches = rows_of(engine, side, shape)
    return measure(engine, batches), formula(engine, batches)


# --- the contest --------------------------------------------------------------------------------


def during(neighbours: Neighbours, run: Callable[[], list[tuple[float, float, float]]]) -> float:
    """Seconds of a side's turn: its slowest rank's."""
    neighbours.begin()
    results = run()
    seconds = max(wall for wall, _, _ in results)
    neighbours.end(seconds, sum(burnt for _, burnt, _ in results))
    return seconds


def contest(
    pool: RankPool, layout: str, options: argparse.Namespace, profiled: bool
) -> dict[str, Any]:
    """Turns of one layout and of the one process; returns the figures.

    ``profiled``: profile the one process, too.
    """
    shape = SHAPES["tiny" if options.tiny else "110M"]
    one, two = (Side(*s, options.precision) for s in ((ALONE, 1, 2), (layout, 2, 1)))
    sides = {ALONE: one, layout: two}
    for side in sides.values():
        pool.run(enter, side, shape, options.compile, world=side.world, timeout=900)
    laps, neighbours, before = Laps(), Neighbours(), load()
    losses: dict[str, float] = {}
    for lap in range(options.warmup + options.turns):
        for name, side in sides.items():

            def run(side: Side = side) -> list[tuple[float, float, float]]:
                return pool.run(turn, side, options.steps, world=side.world, timeout=900)

            if lap < options.warmup:
                losses[name] = run()[-1][2]
            else:
                laps.add(name, during(neighbours, run) / options.steps)
    rates = {
        name: sum(pool.run(gemm, side, options.gemm_s, world=side.world))
        for name, side in sides.items()
    }
    profiles = {}
    if options.profile:
        for name, side in list(sides.items())[0 if profiled else 1 :]:
            profiles[name] = pool.run(top_operators, side, options.steps, world=side.world)[0]
    return {
        "layout": layout,
        "seconds": {n: laps.median(n) for n in sides},
        "tokens_per_second": {n: shape.tokens / laps.median(n) for n in sides},
        "ratio": laps.ratio(layout, ALONE),
        "gemm": rates,
        "load": [before, load()],
        "others": neighbours.cores,
        "quiet": neighbours.quiet,
        "losses": losses,
        "profiles": profiles,
    }


def occupy(pool: RankPool, side: Side, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each category: the rank where the formula errs most."""
    shape = SHAPES["tiny" if options.tiny else "110M"]
    found = pool.run(memory_of, side, shape, world=side.world, timeout=900)
    rows = []
    for category in found[0][0]:
        errors = [error(m[category], f[category]) for m, f in found]
        rank = max(range(side.world), key=lambda r: abs(errors[r]))
        measured, expected = (d[category] for d in found[rank])
        row = {"layout": side.layout, "category": category, "rank": rank, "measured": measured}
        rows.append(row | {"formula": expected, "error": errors[rank]})
    return rows


def report(results: list[dict[str, Any]], mode: str) -> None:
    """Print speed: a row for each layout, then the profiles."""
    lines = []
    for r in results:
        name = r["layout"]
        speed, rate = r["tokens_per_second"], r["gemm"]
        ratio = verdict(r["ratio"], TARGETS[name]) if r["quiet"] else "rejected: busy machine"
        lines.append(
            [
                name,
                f"{speed[name]:.0f}",
                f"{speed[ALONE]:.0f}",
                f"{rate[name] / 1e9:.0f}",
                f"{rate[ALONE] / 1e9:.0f}",
                f"{r['others']:.2f}",
                " to ".join(r["load"]),
                ratio,
            ]
        )
    print(f"\nspeed, both sides {mode}: two ranks x 1 thread against one process x 2 threads")
    head = ["", "tokens/s", "one's", "GEMM GFLOP/s", "one's", "other cores", "load", "ratio"]
    print(table(head, lines))
    for r in results:
        for name, text in r["profiles"].items():
            print(f"\n{r['layout']}, where the time of {name} goes (rank 0)\n{text}")


def report_memory(rows: list[dict[str, Any]]) -> None:
    """Print memory: a row for each layout and category."""
    lines = []
    for r in rows:
        within = abs(r["error"]) <= MEMORY_TARGET
        lines.append(
            [
                f"{r['layout']} {r['category']}",
                r["rank"],
                f"{r['measured'] / 1e6:.1f}",
                f"{r['formula'] / 1e6:.1f}",
                f"{r['error']:+.1%}",
                "met" if within else "MISSED",
            ]
        )
    print("\nmemory by category, eager, on the rank where the formula errs most")
    head = ["", "rank", "MB", "formula", "error", f"within {MEMORY_TARGET:.0%}"]
    print(table(head, lines))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line and measure each layout; returns what was printed, as data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--compile", action="store_true", help="compile both sides")
    parser.add_argument("--turns", type=int, default=9, help="counted turns of each side")
    parser.add_argument("--warmup", type=int, default=2, help="turns that are not counted")
    parser.add_argument("--steps", type=int, default=1, help="steps a turn")
    parser.add_argument("--gemm-s", type=float, default=4.0, help="seconds to measure products")
    parser.add_argument("--profile", action="store_true", help="print each side's top operators")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="a toy model: a dry run")
    parser.add_argument("--no-memory", action="store_true", help="speed only")
    parser.add_argument("--no-speed", action="store_true", help="memory only")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")
    options = parser.parse_args(argv)
    pool = RankPool()
    results: dict[str, Any] = {"speed": [], "memory": []}
    try:
        for layout in [] if options.no_speed else options.layouts:
            first = not results["speed"]
            results["speed"].append(contest(pool, layout, options, profiled=first))
        if results["speed"]:
            report(results["speed"], "compiled" if options.compile else "eager")
        if not options.no_memory:
            for side in [(ALONE, 1, 2), *((name, 2, 1) for name in options.layouts)]:
                results["memory"] += occupy(pool, Side(*side, options.precision), options)
            report_memory(results["memory"])
    finally:
        pool.close()
    if options.json:
        print(json.dumps(results))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
