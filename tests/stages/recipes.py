"""Tiny recipes and what tests do with them inside rank processes."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from shardwise import checkpoint
from shardwise.config.load import load_config
from shardwise.engines.native import NativeEngine
from shardwise.stages.loop import Loop
from shardwise.stages.run import run_rank

TASK = {"kind": "count_letters", "min_length": 2, "max_length": 4}
ARITHMETIC = {"kind": "arithmetic", "operations": ["chain"], "max_digits": 1}
PREFERENCES: dict[str, dict[str, Any]] = {
    "dpo": {
        "steps": 4,
        "batch": {"global_batch": 4, "micro_batch": 2, "seq_len": 96},
        "task": TASK,
        "num_problems": 16,
        "num_held_out": 5,
        "answers_per_problem": 2,
        "validation": {"every": 2},
    },
    "online_dpo": {
        "steps": 4,
        "batch": {"global_batch": 4, "micro_batch": 2, "seq_len": 96},
        "task": TASK,
        "num_problems": 20,
        "samples_per_prompt": 3,
        "sampling": {"max_new_tokens": 4},
        "reward": {"parts": [{"kind": "language"}]},
        "keep_rollouts_every": 1,
    },
    "distill": {
        "steps": 4,
        "batch": {"global_batch": 4, "micro_batch": 2, "seq_len": 96},
        "task": TASK,
        "num_problems": 12,
        "on_policy_fraction": 0.5,
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 4},
        "loss": {"top_k": 8},
    },
    "process_reward": {
        "steps": 4,
        "batch": {"global_batch": 4, "micro_batch": 2, "seq_len": 128},
        "task": {**ARITHMETIC, "style": "steps"},
        "data": {"separator": ", "},
        "num_problems": 8,
        "num_held_out": 4,
        "answers_per_problem": 2,
        "validation": {"every": 2},
    },
}
TIMES = ("time", "seconds", "tokens_per_second", "tflops", "gemm", "_gb", "step_seconds")


def recipe(folder: Path, *kinds: str, **top: Any) -> dict[str, Any]:
    """A run of the given stages in ``folder``, over a small text corpus written there."""
    corpus = folder.parent / "corpus"
    corpus.mkdir(exist_ok=True, parents=True)
    for i in range(6):
        (corpus / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox. " * (3 + i))
    stages: dict[str, dict[str, Any]] = {
        **copy.deepcopy(PREFERENCES),
        "pretrain": {
            "steps": 4,
            "batch": {"global_batch": 6, "micro_batch": 2, "seq_len": 16},
            "data": {
                "sources": [{"kind": "text", "path": str(corpus / "*.txt")}],
                "validation": [{"kind": "text", "path": str(corpus / "5.txt")}],
            },
            "validation": {"every": 2},
        },
        "sft": {
            "steps": 4,
            "batch": {"global_batch": 4, "micro_batch": 2, "seq_len": 96},
            "task": TASK,
            "num_problems": 12,
        },
        "reward": {
            "steps": 4,
            "batch": {"global_batch": 4, "micro_batch": 2, "seq_len": 96},
            "task": TASK,
            "num_problems": 16,
            "num_held_out": 5,
            "answers_per_problem": 3,
            "validation": {"every": 2},
        },
        "grpo": {
            "steps": 4,
            "batch": {"global_batch": 4, "micro_batch": 2, "seq_len": 96},
            "task": TASK,
            "num_problems": 20,
            "samples_per_prompt": 4,
            "sampling": {"max_new_tokens": 4},
            "reward": {"parts": [{"kind": "language"}]},
            "keep_rollouts_every": 1,
        },
        "ppo": {
            "steps": 4,
            "batch": {"global_batch": 4, "micro_batch": 2, "seq_len": 96},
            "task": TASK,
            "num_problems": 20,
            "samples_per_prompt": 3,
            "sampling": {"max_new_tokens": 4},
            "reward": {"parts": [{"kind": "language"}]},
            "loss": {"kl_target": 1.0, "missing_eos_penalty": 0.5},
            "updates_per_rollout": 2,
            "epochs_per_rollout": 2,
            "keep_rollouts_every": 1,
        },
    }
    return {
        "run_dir": str(folder),
        "seed": 5,
        "model": {
            "family": "llama",
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_size": 64,
            "max_seq_len": 128,
        },
        "engine": {"compile": False},
        "stages": [
            {"kind": k, "optimizer": {"lr": 1e-2}, "checkpoint": {"every": 2}, **stages[k]}
            for k in kinds
        ],
        **top,
    }


def run(config: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """One rank of the run; returns its summary."""
    return run_rank(load_config(config, overrides))


class KilledError(Exception):
    """Stands for a kill: nothing after it runs."""


@contextlib.contextmanager
def killed_at(stage: str, step: int) -> Iterator[None]:
    """Die when ``stage`` comes to ``step`` (counted from 0)."""
    original = Loop._train_step

    def train_step(self: Loop, now: int) -> dict[str, float]:
        if self.config.name == stage and now == step:
            raise KilledError
        return original(self, now)

    with mock.patch.object(Loop, "_train_step", train_step):
        yield


def run_and_die(config: dict[str, Any], stage: str, step: int, *overrides: str) -> None:
    """The run, until the kill."""
    with killed_at(stage, step), contextlib.suppress(KilledError):
        run(config, *overrides)
        raise AssertionError("it should have been killed")


@contextlib.contextmanager
def overflowing(after: int) -> Iterator[None]:
    """From update ``after`` on (counted from 0) of every engine, a gradient is not a number."""
    original = NativeEngine.step

    def step(self: NativeEngine, lr: float) -> float:
        if self.updates >= after:
            self.named.local_gradients()[0].fill_(math.nan)
        return original(self, lr)

    with mock.patch.object(NativeEngine, "step", step):
        yield


def weights(directory: Path, stage: str) -> dict[str, torch.Tensor]:
    """All tensors of a stage's last checkpoint."""
    return dict(checkpoint.read_tensors(directory / "stages" / stage / "checkpoints"))


def metrics(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not any(t in k for t in TIMES)} for r in rows]
