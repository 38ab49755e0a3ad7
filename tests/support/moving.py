"""A small run in our words and in another engine's: the same rows, rates and decays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shardwise.config.load import load_config
from shardwise.data.datasets import build_pretrain_dataset
from shardwise.data.packing import collate
from shardwise.data.tokenizer import ByteTokenizer

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
