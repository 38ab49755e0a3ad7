"""A small run in our words and in another engine's: the same rows, rates and decays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.checkpoint.convert import convert
from shardwise.config.load import load_config
from shardwise.data.datasets import build_pretrain_dataset
from shardwise.data.packing import collate
from shardwise.data.tokenizer import ByteTokenizer
from tests.stages.recipes import metrics, run
from tests.support.pool import RankPool

STEPS, SAVED, BATCH, LENGTH = 6, 3, 4, 16
RATE, DECAY, BETAS, CLIP = 1e-2, 0.1, (0.9, 0.95), 0.5
TEXT = "the quick brown fox jumps over lazy dogs. " * 99


def recipe(folder: Path, model: Path, text: Path) -> dict[str, Any]:
    """What the other run did, in our words: decay for all but norms."""
    stage = {
        "kind": "pretrain",
        "steps": STEPS,
        "batch": {"global_batch": BATCH, "micro_batch": 2, "seq_len": LENGTH},
        "optimizer": {"lr": RATE, "weight_decay": DECAY, "no_decay": ["*norm*"]}
        | {"beta1": BETAS[0], "beta2": BETAS[1]},
        "schedule": {"kind": "constant"},
        "data": {"sources": [{"path": str(text)}]},
    }
    engine = {"precision": "fp32", "max_grad_norm": CLIP, "compile": False, "layout": "dp2.zero1"}
    return {"run_dir": str(folder), "init_from": str(model), "engine": engine, "stages": [stage]}


def batches(config: dict[str, Any], cache: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, targets) of every step, as our stage takes them."""
    loaded = load_config(config).config
    stage = loaded.stages[0]
    rows = build_pretrain_dataset(
        stage.data, ByteTokenizer(), LENGTH, loaded.seed, cache  # type: ignore[attr-defined]
    )  # fmt: skip
    order, found = rows.sampler(stage.name), []
    for step in range(STEPS):
        picked = [rows.row(int(i)) for i in order.batch(step * BATCH, BATCH)]
        batch = collate(picked, range(step * BATCH, (step + 1) * BATCH), True)
        assert bool(batch.loss_mask_BT.all()), "rows of one document, without padding"
        found.append((batch.input_ids_BT, batch.targets_BT))
    return found


def assert_goes_on(
    ranks: RankPool, tmp_path: Path, model: Path, text: Path, said: list[float]
) -> None:
    """What the other run saved in ``run`` goes on as it did there, and not without its moments."""
    moved = tmp_path / "moved"
    convert(tmp_path / "run", moved, "native", base=model, trust_pickle=True)
    losses = {}
    for init_optimizer in (True, False):
        folder = tmp_path / f"ours_{init_optimizer}"
        asked = recipe(folder, moved, text) | {"init_optimizer": init_optimizer}
        ranks.run(run, asked, world=2)
        losses[init_optimizer] = [r["loss"] for r in metrics(folder) if r["kind"] == "train"]
    assert losses[True] == pytest.approx(said[SAVED:], rel=1e-4)
    assert losses[False][1:3] != pytest.approx(said[SAVED + 1 : SAVED + 3], rel=1e-2)
