"""This working tree beside an earlier revision of itself: has anything become slower?

    python benchmarks/versions.py REVISION [--only pretrain grpo rollout] [--pairs 15]

The revision is unpacked by `git archive` into a temporary folder; each tree computes in a process
of its own, by its own benchmarks' code, and they take turns, each first in every other pair. A
pair gives one ratio (seconds there over seconds here: above 1 is faster now); their geometric mean
is printed with its 95 % interval (bootstrap over the pairs).

`pretrain` is a step of the 17M model of pretrain_throughput.py, compiled; `grpo` a step of
grpo_step.py, rollout and reward included; `rollout` greedy generation of rollout.py on SmolLM2's
shape.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 1.5  # of a turn, at least
LOSS = 0.97  # no speed below this may lie in the interval


def pretrain(tiny: bool) -> Callable[[int], object]:
    """A numbered step of pre-training."""
    import pretrain_throughput as bench
    import torch

    from shardwise.precision.policy import resolve

    shape = bench.SHAPES["tiny" if tiny else "17M"]
    precision = resolve("auto", torch.device("cpu"))
    stage = bench.our_stage(shape, bench.RandomRows(shape), not tiny, precision)
    return lambda step: stage.train_step(step, 3e-4)


def grpo(tiny: bool) -> Callable[[int], object]:
    """A numbered step of GRPO."""
    import grpo_step as bench

    stage = bench.our_stage(*((64, 2, 8) if tiny else (256, 4, bench.LENGTH)))
    return lambda step: stage.train_step(step, bench.LR)


def rollout(tiny: bool) -> Callable[[int], object]:
    """Greedy generation, 16 rows; the number says nothing."""
    import torch

    import rollout as bench
    from shardwise.precision.policy import multiplies_bf16

    shape, new = (bench.TINY, 8) if tiny else (bench.SMOLLM2, 64)
    dtype = bench.DTYPES["bf16" if multiplies_bf16(torch.device("cpu")) else "fp32"]
    _, run = bench.ours(bench.hf_folder(shape), dtype, 16, new)
    prompts = torch.randint(10, shape.vocab_size, (16, 32), generator=torch.Generator())
    return lambda step: run(prompts)


CASES = {"pretrain": pretrain, "grpo": grpo, "rollout": rollout}


def serve(case: str, threads: int, tiny: bool) -> None:
    """A contestant: for each line with a number, that many steps, and a line with the seconds."""
    from common import use_threads

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the steps print is no answer
    use_threads(threads)
    step, number = CASES[case](tiny), 0
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step(number)
            number += 1
        answers.write(f"{time.perf_counter() - began}\n")


class Contestant:
    """A tree's process."""

    def __init__(self, tree: Path, case: str, threads: int, tiny: bool) -> None:
        rooms = ("benchmarks", "framework", "kernels")
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).resolve()),
                "--serve",
                case,
                "--threads",
                str(threads),
            ]
            + (["--tiny"] if tiny else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                # This script must find the tree's own modules, not its own neighbours.
                "PYTHONSAFEPATH": "1",
                "PYTHONPATH": os.pathsep.join([*rooms, os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": str(threads),
            },
        )

    def take(self, steps: int) -> float:
        """Seconds of so many steps."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a contestant died: see above")
        return float(line)

    def close(self) -> None:
        """No further turn."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of some ratios and its 95 % interval, by a bootstrap over them."""
    logs = np.log(ratios)
    draws = np.random.default_rng(0).integers(len(logs), size=(20_000, len(logs)))
    low, high = np.quantile(logs[draws].mean(axis=1), [0.025, 0.975])
    return math.exp(float(logs.mean())), math.exp(float(low)), math.exp(float(high))


def race(case: str, before: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All pairs of one case; prints and returns its figures."""
    trees = {"before": before, "now": ROOT}
    sides = {n: Contestant(t, case, options.threads, options.tiny) for n, t in trees.items()}
    for _ in range(2):  # compiling, then warm
        warm = [side.take(2) / 2 for side in sides.values()]
    steps = 1 if options.tiny else max(1, math.ceil(SECONDS / max(warm)))
    ratios, seconds = [], dict.fromkeys(sides, 0.0)
    for pair in range(options.pairs):
        order = list(sides)[:: 1 if pair % 2 else -1]
        took = {name: sides[name].take(steps) / steps for name in order}
        ratios.append(took["before"] / took["now"])
        seconds = {name: seconds[name] + took[name] / options.pairs for name in sides}
    for side in sides.values():
        side.close()
    mean, low, high = interval(ratios)
    print(
        f"{case}: {seconds['before']:.4f} s a step before, {seconds['now']:.4f} s now; now is "
        f"{mean:.3f} times as fast [{low:.3f}, {high:.3f}], {options.pairs} pairs of {steps} steps "
        f"({'no loss of more than 3 %' if low >= LOSS else 'A LOSS OF MORE THAN 3 % IS POSSIBLE'})",
        flush=True,
    )
    return {"mean": mean, "low": low, "high": high, "pairs": options.pairs, "seconds": seconds}


def unpack(revision: str, folder: Path) -> Path:
    """A revision's files in ``folder``."""
    packed = subprocess.run(
        ["git", "archive", revision], cwd=ROOT, stdout=subprocess.PIPE, check=True
    ).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line and race; returns what was printed, as data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", nargs="?", default="HEAD", help="default: HEAD")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="toy models: a self-check")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")
    parser.add_argument("--serve", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve(options.serve, options.threads, options.tiny)
        return {}
    print(f"against {options.revision}, load {os.getloadavg()[0]:.2f} at the start", flush=True)
    with tempfile.TemporaryDirectory(prefix="shardwise-bench-") as folder:
        before = unpack(options.revision, Path(folder))
        found = {case: race(case, before, options) for case in options.only}
    print(f"load {os.getloadavg()[0]:.2f} at the end")
    if options.json:
        print(json.dumps(found))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
