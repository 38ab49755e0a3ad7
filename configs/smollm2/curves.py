"""Draws the curves of finished runs: `python configs/smollm2/curves.py OUT.png` (matplotlib)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = Path("runs")
# Title, metric, runs by label.
PANELS: list[tuple[str, str, dict[str, str]]] = [
    (
        "Fine-tuning: held-out loss, nats a token",
        "val_loss",
        {"all weights": "full_sft", "LoRA": "lora_sft", "QLoRA": "qlora_sft"},
    ),
    ("DPO: pairs ordered as wanted", "pair_accuracy", {"against the reference": "dpo_lora"}),
    (
        "GRPO: mean score of a step",
        "reward_mean",
        {
            "who did what": "grpo_lora_needle",
            "how many sisters": "grpo_lora_siblings",
            **{f"quickstart, seed {i}": f"../grpo_lora_cpu/{i}" for i in (1, 2, 3)},
        },
    ),
]


def points(run: str, metric: str) -> tuple[list[int], list[float]]:
    file = RUNS / "smollm2" / run / "metrics.jsonl"
    rows: list[dict[str, Any]] = (
        [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    )
    found = [(r["step"], r[metric]) for r in rows if metric in r and r["kind"] != "eval"]
    return [step for step, _ in found], [value for _, value in found]


def main(out: str) -> None:
    drawn = [
        (title, {label: xy for label, run in runs.items() if (xy := points(run, metric))[0]})
        for title, metric, runs in PANELS
    ]
    drawn = [(title, curves) for title, curves in drawn if curves]  # of the runs that are there
    figure, [axes] = plt.subplots(
        1, len(drawn), figsize=(5 * len(drawn), 4), layout="constrained", squeeze=False
    )
    for axis, (title, curves) in zip(axes, drawn, strict=True):
        for label, (steps, values) in curves.items():
            axis.plot(steps, values, marker="o" if len(steps) < 9 else None, label=label)
        axis.set(title=title, xlabel="step")
        axis.legend()
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main(sys.argv[1])
