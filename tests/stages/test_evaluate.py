"""`evaluate` gives a run's figures again, from the checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwise.stages.evaluate import evaluate
from tests.stages.recipes import TASK, recipe, run
from tests.support.pool import RankPool


def with_evaluations(folder: Path) -> dict[str, Any]:
    config = recipe(folder, "pretrain", "sft")
    data = config["stages"][0]["data"]
    config["evaluations"] = [
        {"kind": "bits_per_byte", "data": data, "seq_len": 16, "micro_batch": 3},
        {"kind": "problems", "task": TASK, "num_problems": 9, "max_new_tokens": 4},
    ]
    return config


@pytest.mark.parametrize("world", [1, 2])
def test_figures_are_reproduced(ranks: RankPool, tmp_path: Path, world: int) -> None:
    summary = ranks.run(run, with_evaluations(tmp_path / "run"), world=2)[0]
    for stage in summary["stages"]:
        again = ranks.run(evaluate, tmp_path / "run" / stage["checkpoint"], world=world)[0]
        figures = stage["metrics"]
        assert again["accuracy"] == figures["accuracy"]
        assert again["val_bits_per_byte"] == pytest.approx(figures["val_bits_per_byte"], rel=1e-6)
        assert again["gzip_bits_per_byte"] == figures["gzip_bits_per_byte"]
        assert again["majority_baseline"] == figures["majority_baseline"]
        assert again["num_problems"] == 9


def test_bits_per_byte_is_the_loss_in_bits_over_the_bytes(ranks: RankPool, tmp_path: Path) -> None:
    """With plain bytes as tokens, bits a byte is bits a token, but for each document's end."""
    [summary] = ranks.run(run, with_evaluations(tmp_path / "run"), world=1)
    figures = summary["stages"][0]["metrics"]
    text = (tmp_path / "corpus" / "5.txt").read_bytes()
    assert figures["val_bytes"] == len(text)
    assert figures["val_tokens"] == len(text) + 1
    assert 1.0 < figures["val_bits_per_byte"] < 9.0
