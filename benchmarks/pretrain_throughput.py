"""Pre-training throughput beside a hand-written compiled loop and the Hugging Face Trainer.

    python benchmarks/pretrain_throughput.py [--models 17M 110M] [--profile]

Two threads, bf16 (fp32 where the processor has no bf16 products: ``--precision``), AdamW, clipping,
the same shapes and tokens for all. Each contestant has a process, and they take turns (A B C, A B
C, ...); compiling and warm-up are not counted. The hand-written loop exists in two forms, and the
faster one is the peer. Speeds are also given as a fraction of the rate at which these threads
multiply square matrices of that dtype; model FLOPs are 6N plus causal attention
(`shardwise.metrics.flops`).

``--clock cpu`` counts processor seconds instead of the wall's. With ``--threads 1`` that compares
fairly on a busy machine, apart from disturbed caches; it says nothing about scaling.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from common import clock, profile, stage_context, table, use_threads, verdict
from contest import Contest, Lap
from peers.handwritten import Loop, Shape

from shardwise.data.packing import Row
from shardwise.metrics.gemm import measure_gemm
from shardwise.metrics.timing import Laps, load
from shardwise.models.dense.llama import LlamaConfig
from shardwise.precision.policy import PRECISIONS, resolve
from shardwise.stages.loop import flops_per_token
from shardwise.stages.supervised import SupervisedStage

SHAPES = {
    s.name: s
    for s in (
        Shape("tiny", 256, 64, 2, 4, 2, 128, 2, 32),
        Shape("17M", 8192, 384, 8, 6, 6, 1024, 8, 256),
        Shape("110M", 32000, 768, 12, 12, 12, 2048, 8, 512),
    )
}
OURS, HAND, MASTERS, TRAINER = "shardwise", "hand-written", "hand-written, masters", "HF Trainer"
TARGET_HAND, TARGET_TRAINER, TARGET_GEMM = 0.97, 1.3, 0.6
NUM_ROWS = 64  # rows of random tokens that every contestant cycles through


class RandomRows:
    """Rows of random tokens, and their order: 0, 1, 2, ... again and again."""

    num_rows = NUM_ROWS

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (NUM_ROWS, shape.seq_len + 1)
        self.tokens = torch.randint(shape.vocab_size, size, generator=generator)

    def row(self, index: int) -> Row:
        """One document that fills the row."""
        tokens = self.tokens[index].numpy()
        length = tokens.size - 1
        valid, segment = np.ones(length, dtype=np.bool_), np.zeros(length, dtype=np.int64)
        return Row(tokens[:-1], np.arange(length), tokens[1:], valid, segment, 1)

    def num_pairs(self, index: int) -> int:
        """Of a row, without padding: all."""
        return int(self.tokens.shape[1]) - 1

    def batch(self, position: int, size: int) -> np.ndarray:
        """Indices of the rows at ``position`` and after."""
        return np.arange(position, position + size) % NUM_ROWS

    def pairs(self, position: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same rows as (inputs, targets)."""
        rows = self.tokens[torch.from_numpy(self.batch(position, size))]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def model_of(shape: Shape) -> dict[str, Any]:
    """The model's section of a recipe."""
    return {
        "family": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "ffn_size": shape.ffn_size,
        "max_seq_len": shape.seq_len,
    }


def our_stage(
    shape: Shape, rows: RandomRows, compile: bool, precision: str = "bf16"
) -> SupervisedStage:
    """What `train` builds for a pretrain stage, with these rows in place of a prepared corpus."""
    batch = {"global_batch": shape.batch, "micro_batch": shape.batch, "seq_len": shape.seq_len}
    engine = {"precision": precision, "compile": compile, "device": "cpu"}
    stage = {"kind": "pretrain", "steps": 1, "batch": batch, "engine": engine}
    return SupervisedStage(stage_context(model_of(shape), stage), rows, rows, None, "random")


def contestant(
    name: str, shape: Shape, compile: bool, precision: str, steps: int, lap: Lap
) -> None:
    """One contestant; a turn is ``steps`` steps."""
    rows = RandomRows(shape)
    lap.start()
    if name == TRAINER:
        from peers import hf_trainer

        hf_trainer.train(
            shape,
            rows.tokens[:, :-1],
            compile=compile,
            bf16=precision == "bf16",
            steps_per_turn=steps,
            turn=lap,
        )
        return
    step = stepper(name, shape, rows, compile, precision)
    for number in itertools.count():
        step(number)
        if (number + 1) % steps == 0 and not lap():
            return


def stepper(
    name: str, shape: Shape, rows: RandomRows, compile: bool, precision: str
) -> Callable[[int], object]:
    """What takes one numbered step of anyone but the Trainer, whose loop is its own."""
    if name == OURS:
        stage = our_stage(shape, rows, compile, precision)
        return lambda number: stage.train_step(number, 3e-4)
    kind = "masters" if name == MASTERS else "autocast" if precision == "bf16" else "fp32"
    loop = Loop(shape, kind, compile)  # type: ignore[arg-type]
    return lambda number: loop.step(*rows.pairs(number * shape.batch, shape.batch))


def race(
    shape: Shape, compile: bool, precision: str, threads: int, turns: int, warmup: int
) -> tuple[Laps, int]:
    """Seconds of everyone's turns, and the steps of a turn."""
    steps = min(4, max(1, round(2**21 / shape.tokens / shape.hidden_size)))  # 1 to 3 s
    names = (OURS, HAND, *((MASTERS,) if precision == "bf16" else ()), TRAINER)
    contest = Contest(
        {n: partial(contestant, n, shape, compile, precision, steps) for n in names}, threads
    )
    return contest.run(turns, warmup), steps


def report(shape: Shape, laps: Laps, steps: int, gemm: float) -> dict[str, object]:
    """Print the table and the ratios of one model; returns them."""
    flops = flops_per_token(LlamaConfig(**model_of(shape)), shape.seq_len)
    rows, speeds = [], {}
    for name in laps.seconds:
        speeds[name] = steps * shape.tokens / laps.median(name)
        rate = speeds[name] * flops
        rows.append(
            [
                name,
                f"{laps.median(name) / steps:.3f}",
                f"{speeds[name]:.0f}",
                f"{rate / 1e9:.0f}",
                f"{rate / gemm:.2f}",
                f"{laps.ratio(OURS, name):.2f}",
            ]
        )
    print(table(["", "s/step", "tokens/s", "GFLOP/s", "of GEMM", "shardwise is"], rows))
    hand = min(set(laps.seconds) - {OURS, TRAINER}, key=laps.median)
    ratios = {"hand": laps.ratio(OURS, hand), "trainer": laps.ratio(OURS, TRAINER)}
    fraction = speeds[OURS] * flops / gemm
    print(f"against {hand} (the faster one): {verdict(ratios['hand'], TARGET_HAND)}")
    print(f"against the HF Trainer: {verdict(ratios['trainer'], TARGET_TRAINER)}")
    if shape.name == "110M":
        print(f"fraction of the GEMM rate: {verdict(fraction, TARGET_GEMM)}")
    return {"tokens_per_second": speeds, "ratios": ratios, "fraction_of_gemm": fraction}


def profile_ours(shape: Shape, precision: str) -> str:
    """Where the time of our step goes. Compiled kernels name themselves, which costs a little."""
    import torch._inductor.config as inductor

    torch.compiler.reset()
    with inductor.patch({"cpp.enable_kernel_profile": True, "fx_graph_cache": False}):
        stage = our_stage(shape, RandomRows(shape), compile=True, precision=precision)
        for step in range(2):
            stage.train_step(step, 3e-4)
        return profile(lambda: stage.train_step(2, 3e-4), repeats=3)


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Parse the command line and measure each model; returns what was printed, as data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["17M", "110M"])
    parser.add_argument("--turns", type=int, default=7, help="counted turns (default 7)")
    parser.add_argument("--warmup", type=int, default=2, help="turns that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--no-compile", action="store_true", help="compile nobody")
    parser.add_argument("--profile", action="store_true", help="print where our time goes")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")
    options = parser.parse_args(argv)
    use_threads(options.threads)
    clock.kind = options.clock
    results: dict[str, object] = {}
    precision = resolve(options.precision, torch.device("cpu"))
    dtype = PRECISIONS[precision].compute
    for name in options.models:
        shape = SHAPES[name]
        before = load()
        rates = [measure_gemm(dtype, budget_s=4.0)]
        laps, steps = race(
            shape,
            not options.no_compile,
            precision,
            options.threads,
            options.turns,
            options.warmup,
        )
        rates.append(measure_gemm(dtype, budget_s=4.0))
        best = max(rates, key=lambda r: r.flops)
        gemm = best.flops
        print(
            f"\n{name}: {shape.batch} x {shape.seq_len} tokens, {precision}, "
            f"{options.threads} threads, {options.clock} clock, "
            f"load {before} before and {load()} after; GEMM "
            f"{gemm / 1e9:.0f} GFLOP/s at {best.size}"
        )
        results[name] = report(shape, laps, steps, gemm)
        if options.profile:
            print(profile_ours(shape, precision))
    if options.json:
        print(json.dumps(results))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
