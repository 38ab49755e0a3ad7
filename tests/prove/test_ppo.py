"""The promise of configs/ppo_cpu.yaml, over three seeds, from the quickstart's fine-tuned model."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from shardwise.launch.train import train

RECIPE = Path(__file__).parents[2] / "configs" / "ppo_cpu.yaml"
SEEDS = (1, 2, 3)
LAST = 10  # steps over which the critic's explained variance is averaged


def explained_variance(run_dir: Path) -> float:
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [r["explained_variance"] for r in lines if "explained_variance" in r]
    return statistics.mean(found[-LAST:])


@pytest.mark.slow
def test_ppo_keeps_its_promise_over_three_seeds(quickstart: Path, tmp_path: Path) -> None:
    lifts, explained = [], []
    for seed in SEEDS:
        run_dir = tmp_path / str(seed)
        overrides = [
            f"seed={seed}",
            f"run_dir={run_dir}",
            f"init_from={quickstart}/stages/sft/checkpoints",
            f"tokenizer.path={quickstart}/tokenizer/tokenizer.json",
        ]
        summary = train(RECIPE, overrides, nproc=2)
        assert summary["num_problems"] == 500
        lifts.append(summary["accuracy"]["ppo"] - summary["accuracy"]["start"])
        explained.append(explained_variance(run_dir))
    print(f"\nlift {lifts}, mean {statistics.mean(lifts):.3f}; explained variance {explained}")
    assert statistics.mean(lifts) >= 0.15
    assert all(lift > 0 for lift in lifts)
    assert min(explained) > 0.3
