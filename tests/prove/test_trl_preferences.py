"""Stage dpo beside TRL's trainers: the same model, rows and optimizer give the same losses.

The first step (policy and reference are one) and those after it, when they are not.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from shardwise.checkpoint.convert import convert
from shardwise.data.sampler import Sampler
from tests.stages.recipes import metrics, recipe, run
from tests.support.pool import RankPool

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

# At ten times this rate one step takes the hinge to zero, where it stays.
STEPS, LR, BETA = 4, 3e-4, 0.5
PAIRS = [
    {"prompt": f"{i} and {i}?", "chosen": " are alike" + "!" * (i % 3), "rejected": " no" * (i + 1)}
    for i in range(6)
]
# Ours beside TRL's arguments.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"loss_type": ["sigmoid"]}),
    ({"length_normalised": True}, {"loss_type": ["sigmoid_norm"]}),
    ({"ld_alpha": 0.3}, {"loss_type": ["sigmoid"], "ld_alpha": 0.3}),
    ({"sft_weight": 0.4}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}),
    ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ({"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    ({"divergence": "alpha", "divergence_alpha": 0.5}, {"f_divergence_type": "alpha_divergence"}),
    ({"kind": "robust", "label_smoothing": 0.1},
     {"loss_type": ["robust"], "label_smoothing": 0.1}),
    ({"kind": "ipo"}, {"loss_type": ["ipo"]}),
    ({"kind": "hinge"}, {"loss_type": ["hinge"]}),
    ({"kind": "exo", "label_smoothing": 0.01},
     {"loss_type": ["exo_pair"], "label_smoothing": 0.01}),
    ({"kind": "apo_zero"}, {"loss_type": ["apo_zero"]}),
    ({"kind": "apo_down"}, {"loss_type": ["apo_down"]}),
    ({"kind": "discopop"}, {"loss_type": ["discopop"]}),
]  # fmt: skip


@pytest.fixture(scope="module")
def start(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("start")
    ranks.run(run, recipe(folder / "run", "sft"), world=1)
    convert(folder / "run/stages/sft/checkpoints", folder / "hf", "hf", "fp32")
    yield folder / "hf"


def in_order(config: dict[str, Any]) -> dict[str, Any]:
    """A run whose batches hold all rows as they stand; KTO's mismatched answers follow it."""

    def batch(self: Any, position: int, size: int) -> np.ndarray:
        return np.arange(position, position + size) % len(PAIRS)

    with mock.patch.object(Sampler, "batch", batch):
        return run(config)


def ours(
    ranks: RankPool, folder: Path, start: Path, rows: list[dict[str, Any]], loss: dict[str, Any]
) -> list[float]:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = recipe(folder / "run", "dpo", init_from=str(start))
    config["tokenizer"] = {"kind": "file", "path": str(start)}
    source = {"kind": "preference-jsonl", "path": str(file)}
    config["stages"][0] |= {
        "steps": STEPS,
        "task": None,
        "data": {"sources": [source], "texts": "raw"},
        "batch": {"global_batch": len(rows), "micro_batch": 2, "seq_len": 96},
        "optimizer": {"lr": LR, "beta2": 0.999, "weight_decay": 0.0},
        "schedule": {"kind": "constant"},
        "loss": {"beta": BETA, **loss},
    }
    ranks.run(in_order, config, world=1)
    return [r["loss"] for r in metrics(folder / "run") if r["kind"] == "train"]


def theirs(
    trainer: Any, config: Any, folder: Path, start: Path, rows: list[dict[str, Any]], **said: Any
) -> list[float]:
    arguments = config(
        output_dir=str(folder / "trl"), per_device_train_batch_size=len(rows), max_steps=STEPS,
        learning_rate=LR, lr_scheduler_type="constant", adam_beta2=0.999, max_grad_norm=1.0,
        beta=BETA, logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        gradient_checkpointing=False, max_length=None, disable_tqdm=True, **said,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(start)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    data = datasets.Dataset.from_list(rows)
    made = trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    made.train()
    return [row["loss"] for row in made.state.log_history if "loss" in row]


@pytest.mark.parametrize(("loss", "said"), CASES, ids=str)
def test_paired_losses(
    ranks: RankPool, tmp_path: Path, start: Path, loss: dict[str, Any], said: dict[str, Any]
) -> None:
    peer = functools.partial(theirs, trl.DPOTrainer, trl.DPOConfig)
    expected = peer(tmp_path, start, PAIRS, **said)
    assert len(expected) == STEPS and len(set(expected)) == STEPS
    assert ours(ranks, tmp_path, start, PAIRS, loss) == pytest.approx(expected, rel=2e-4)


def test_kto(ranks: RankPool, tmp_path: Path, start: Path) -> None:
    rows = [
        {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"],
         "label": bool(i % 2)} for i, p in enumerate(PAIRS)
    ]  # fmt: skip
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    expected = theirs(trl.KTOTrainer, trl.KTOConfig, tmp_path, start, rows, **weights)
    assert len(expected) == STEPS and len(set(expected)) == STEPS
    found = ours(ranks, tmp_path, start, rows, {"kind": "kto", **weights})
    assert found == pytest.approx(expected, rel=2e-4)
