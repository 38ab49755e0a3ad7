"""The quickstart's promise: fine-tuning ends in the middle under ten seeds, and rewards alone lift
held-out accuracy over three."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.launch.train import train
from shardwise.stages.evaluate import evaluate
from tests.prove.conftest import RECIPE

SEEDS = (1234, 7, 99)  # of the whole; the first is the run's own
MORE_SFT_SEEDS = (1, 2, 3, 4, 5, 8, 9)


def without_pretraining(base: Path, run_dir: Path, seed: int, *kinds: str) -> dict[str, Any]:
    """The recipe's stages of these kinds, from a pre-trained model, under another seed."""
    config = load_config(RECIPE).config.model_dump(mode="json", exclude_none=True)
    config["stages"] = [s for s in config["stages"] if s["kind"] in kinds]
    config["evaluations"] = [e for e in config["evaluations"] if e["kind"] == "problems"]
    config["init_from"] = str(base / "stages" / "pretrain" / "checkpoints")
    config["tokenizer"] = {"kind": "file", "path": str(base / "tokenizer")}
    return config | {"run_dir": str(run_dir), "seed": seed}


@pytest.mark.slow
def test_quickstart_keeps_its_promise(quickstart: Path, tmp_path: Path) -> None:
    summaries = [json.loads((quickstart / "summary.json").read_text())]
    for seed in SEEDS[1:]:
        recipe = without_pretraining(quickstart, tmp_path / str(seed), seed, "sft", "grpo")
        summaries.append(train(recipe, nproc=2))
    before = [s["accuracy"]["sft"] for s in summaries]
    for seed in MORE_SFT_SEEDS:
        recipe = without_pretraining(quickstart, tmp_path / str(seed), seed, "sft")
        before.append(train(recipe, nproc=2)["accuracy"]["sft"])
    first = summaries[0]
    assert first["val_bits_per_byte"] < first["gzip_bits_per_byte"]
    assert all(s["num_problems"] >= 500 for s in summaries)
    lifts = [s["accuracy"]["grpo"] - s["accuracy"]["sft"] for s in summaries]
    print(f"\nsft {before}\nlift {lifts}, mean {statistics.mean(lifts):.3f}")
    assert len(before) == 10 and all(0.25 <= b <= 0.65 for b in before)
    assert all(b > first["majority_baseline"] for b in before)
    assert statistics.mean(lifts) >= 0.15
    assert all(lift > 0 for lift in lifts)
    last = first["stages"][-1]
    again = evaluate(quickstart / last["checkpoint"])
    assert again["accuracy"] == last["metrics"]["accuracy"]
