"""A made-up but lifelike run, to look at and to test the report with.

``python -m tests.report.synthetic FOLDER`` writes one and its report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from shardwise.metrics.jsonl import JsonLines

CONFIG = """\
name: quickstart
seed: 0
model:
  family: llama
  hidden: 256
  num_layers: 8
tokenizer:
  kind: bpe
  vocab_size: 4096
engine:
  layout: dp2.zero1
  precision: bf16
stages:
  - kind: pretrain
    name: pretrain
    steps: 900
  - kind: sft
    name: sft
    steps: 60
  - kind: grpo
    name: grpo
    steps: 160
evaluations:
  - kind: bits_per_byte
    name: bits_per_byte
  - kind: problems
    name: held_out
"""

PROMPTS = [
    ("Count the letter a: b a c c a b", "2"),
    ("Count the letter c: c c c a b c a b", "4"),
    ("Count the letter b: a a c a c a a", "0"),
    ("Count the letter a: a b a a c a a b c a b", "6"),
    ("Count the letter b: b c a b b", "3"),
    ("Count the letter c: a c b c c a c c b a c c", "7"),
    ("Count the letter a: c b b c a b", "1"),
]


def _noisy(rng: np.random.Generator, start: float, end: float, n: int, noise: float) -> Any:
    x = np.arange(n) / max(n - 1, 1)
    curve = end + (start - end) * (0.7 * np.exp(-x * 14) + 0.3 * np.exp(-x * 2.5))
    return curve * (1 + noise * rng.standard_normal(n))


def lines(seed: int = 0, steps: tuple[int, int, int] = (900, 60, 160)) -> list[dict[str, Any]]:
    """metrics.jsonl of a healthy run of three stages."""
    rng = np.random.default_rng(seed)
    clock = 1.76e9
    out: list[dict[str, Any]] = []
    speeds = {"pretrain": 5600.0, "sft": 5100.0, "grpo": 2300.0}
    for (stage, speed), n in zip(speeds.items(), steps):
        loss = {
            "pretrain": lambda n=n: _noisy(rng, 8.4, 3.0, n, 0.02),
            "sft": lambda n=n: _noisy(rng, 2.6, 0.31, n, 0.04),
            "grpo": lambda n=n: 0.02 * rng.standard_normal(n),
        }[stage]()
        reward = 0.31 + 0.42 * (1 - np.exp(-np.arange(n) / max(n, 1) * 2.6))
        for i in range(n):
            clock += 0.45
            row: dict[str, Any] = {
                "time": round(clock, 3),
                "stage": stage,
                "step": i + 1,
                "kind": "train",
                "loss": float(loss[i]),
                "grad_norm": float(abs(0.7 + 2.0 / (1 + i / 8) + 0.1 * rng.standard_normal())),
                "lr": 1e-3 * min(1, (i + 1) / 20) * (0.55 + 0.45 * np.cos(np.pi * i / n)),
                "tokens": 2048,
                "tokens_per_second": float(speed * (1 + 0.03 * rng.standard_normal())),
                "fraction_of_gemm": float(speed / 9000 * (1 + 0.03 * rng.standard_normal())),
                "memory_gb": 1.1 + 0.2 * (stage == "grpo"),
                "step_seconds": 0.4,
            }
            if stage == "grpo":
                row |= {
                    "reward_mean": float(np.clip(reward[i] + 0.05 * rng.standard_normal(), 0, 1)),
                    "reward_std": float(0.42 - 0.1 * i / n + 0.02 * rng.standard_normal()),
                    "entropy_estimate": float(1.5 - 0.9 * i / n + 0.05 * rng.standard_normal()),
                    "approx_kl": float(0.002 + 0.001 * rng.random()),
                    "degenerate_fraction": float(np.clip(0.15 + 0.3 * i / n, 0, 1)),
                    "completion_length": 4.2,
                }
            out.append(row)
            head = {"time": round(clock, 3), "stage": stage, "step": i + 1}
            if stage == "pretrain" and ((i + 1) % max(n // 9, 1) == 0 or i + 1 == n):
                value = float(3.2 + 5 * np.exp(-4 * (i + 1) / n))
                out.append(
                    head
                    | {
                        "kind": "validation",
                        "val_loss": value,
                        "val_bits_per_byte": value / 1.706,
                    }
                )
            if stage == "grpo" and (i + 1) % max(n // 8, 1) == 0:
                accuracy = float(0.59 + 0.29 * (1 - np.exp(-3 * (i + 1) / n)))
                out.append(head | {"kind": "eval", "accuracy": accuracy})
        if stage == "pretrain":
            message = "non-finite gradients; weights kept"
            where = {"time": round(clock, 3), "stage": stage, "step": 412, "kind": "event"}
            out.append(where | {"event": "skipped", "message": message})
    return out


def samples() -> list[dict[str, Any]]:
    """Completions before and after, and a free continuation."""
    out: list[dict[str, Any]] = []
    for i, (prompt, answer) in enumerate(PROMPTS):
        said = {
            "pretrain": "def __init__(self, name):\n    self.name = name\n",
            "sft": answer if i % 2 else str((int(answer) + 1) % 8),
            "grpo": answer if i != 5 else "8",
        }
        for stage, completion in said.items():
            out.append(
                {
                    "stage": stage,
                    "prompt": prompt,
                    "completion": completion,
                    "answer": answer,
                    "correct": completion == answer,
                }
            )
    text = (
        "    def close(self):\n        if self._file is not None:\n            self._file.close()"
    )
    out.append({"stage": "pretrain", "prompt": "class Reader:\n", "completion": text})
    return out


def summary() -> dict[str, Any]:
    """summary.json of the same run."""
    hashes = ["3f9c0a7be1d24c55a0b1c2d3e4f50617", "a81be07714c94a02b7d1e2f3a4b5c6d7"]
    stages = []
    parent = ""
    for name, steps, seconds, tokens, figures in (
        ("pretrain", 900, 331.0, 1_843_200, {"loss": 3.0211, "val_loss": 3.2916}),
        ("sft", 60, 26.0, 122_880, {"loss": 0.31}),
        ("grpo", 160, 148.0, 912_000, {"loss": -0.002, "reward_mean": 0.7012}),
    ):
        stages.append(
            {
                "name": name,
                "kind": name,
                "steps": steps,
                "layout": "dp2.zero1",
                "checkpoint": f"runs/quickstart/stages/{name}/checkpoints/step_{steps:08d}",
                "config_hash": hashes[0],
                "data_hash": hashes[1],
                "parent_hash": parent,
                "seconds": seconds,
                "tokens": tokens,
                "figures": figures,
                "metrics": {"loss": 3.02 if name == "pretrain" else 0.31},
            }
        )
        parent = "77aa" + hashes[0][4:]
    return {
        "name": "quickstart",
        "val_bits_per_byte": 1.874,
        "gzip_bits_per_byte": 2.091,
        "xz_bits_per_byte": 2.003,
        "val_source": "stdlib:validation",
        "accuracy": {"pretrain": 0.004, "sft": 0.594, "grpo": 0.871},
        "majority_baseline": 0.231,
        "num_problems": 512,
        "tokens_per_second": 5612.0,
        "fraction_of_gemm": 0.61,
        "gemm_gflops": 706.0,
        "layout": "dp2.zero1",
        "wall_seconds": 537.0,
        "expected_seconds": {"before": 12.0, "pretrain": 350.0, "sft": 30.0, "grpo": 130.0},
        "stages": stages,
        "samples": samples(),
        "evaluations": [
            {"kind": "bits_per_byte", "name": "bits_per_byte"},
            {"kind": "problems", "name": "held_out"},
        ],
        "tokens": {"train": 2_878_080},
        "machine": {
            "processor": "An imaginary processor at 2.6 GHz",
            "num_cores": 2,
            "load_1min": 0.42,
            "threads_per_process": 1,
            "memory_gb": 15.6,
            "torch": "2.13.0",
            "python": "3.11.9",
        },
    }


def write_run(
    folder: Path,
    *,
    metrics: list[dict[str, Any]] | None = None,
    summary_: dict[str, Any] | None = None,
    config: str | None = CONFIG,
) -> Path:
    """Write a run's files into ``folder``; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = JsonLines(folder / "metrics.jsonl")
    for row in lines() if metrics is None else metrics:
        file.append(row)
    file.close()
    if config is not None:
        (folder / "config.yaml").write_text(config)
    if summary_ is not None:
        (folder / "summary.json").write_text(json.dumps(summary_))
    return folder


if __name__ == "__main__":
    from shardwise.report.api import report
    from shardwise.report.summary import summary_lines

    target = write_run(Path(sys.argv[1]), summary_=summary())
    path = report(target)
    print("\n".join(summary_lines(summary(), str(path))))
