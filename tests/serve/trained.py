"""A tiny model that was trained for real, and a log of what users might say of it."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shardwise.serve.log import LogWriter
from tests.stages.recipes import run

TASK = {"kind": "count_letters", "targets": "a", "min_length": 2, "max_length": 5}
_TEXTS = ("the quick brown fox jumps over the lazy dog. ", "to be or not to be. ", "it rains. ")


def train_model(folder: Path) -> Path:
    """Texts, then problems; the last checkpoint."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for i in range(6):
        text = "".join(_TEXTS[(i + k * (i + 1)) % 3] for k in range(30))
        (corpus / f"{i}.txt").write_text(f"document {i}: {text}")
    common = {"optimizer": {"lr": 5e-3}, "schedule": {"kind": "linear", "warmup_steps": 5}}
    run(
        {
            "run_dir": str(folder / "run"),
            "seed": 3,
            "model": {
                "family": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4,
                "num_kv_heads": 2, "ffn_size": 128, "max_seq_len": 128,
            },
            "engine": {"compile": False},
            "stages": [
                {
                    "kind": "pretrain", "steps": 60, **common,
                    "batch": {"global_batch": 8, "micro_batch": 8, "seq_len": 64},
                    "data": {
                        "sources": [{"kind": "text", "path": str(corpus / "[0-4].txt")}],
                        "validation": [{"kind": "text", "path": str(corpus / "5.txt")}],
                    },
                },
                {
                    "kind": "sft", "steps": 150, **common,
                    "batch": {"global_batch": 32, "micro_batch": 32, "seq_len": 96},
                    "data": {"pack": False}, "task": TASK, "num_problems": 64,
                },
            ],
            "evaluations": [
                {"kind": "bits_per_byte", "stages": ["pretrain"], "seq_len": 64, "stride": 32},
                {"kind": "problems", "task": TASK, "num_problems": 40, "max_new_tokens": 4},
            ],
        }
    )  # fmt: skip
    return folder / "run" / "stages" / "sft" / "checkpoints"


@functools.cache
def model() -> Path:
    """One for all tests of a process."""
    return train_model(Path(tempfile.mkdtemp()))


def corrections(count: int) -> list[dict[str, Any]]:
    """What users correct: questions of a new kind, and of the kind that it was trained on."""
    rng = random.Random(5)
    rows = []
    for i in range(count):
        letters = [rng.choice("abcd") for _ in range(2 + i % 4)]
        old = f"Count the letter a: {' '.join(letters)}"
        rows.append({"prompt": f"sky {i}?", "correction": "blue"})
        rows.append({"prompt": old, "correction": str(letters.count("a"))})
    return rows


def write_log(file: Path, said: Iterable[dict[str, Any]]) -> Path:
    """A log of answers with feedback: of each prompt, answer, and rating or correction, client."""
    LogWriter(file).close()
    with file.open("a") as stream:
        stream.writelines(record(f"{i}", one) for i, one in enumerate(said))
    return file


def record(name: str, one: dict[str, Any]) -> str:
    """The lines of an answer and of what was said of it."""
    own = {"id": name, "time": 0.0, "client": one.get("client", "c")}
    choice = {"text": one.get("answer", "?"), "token_ids": [0], "logprobs": [0.0],
              "weights": [], "finish_reason": "stop"}  # fmt: skip
    prompt = [{"role": "user", "content": one["prompt"]}]
    answer = {"kind": "answer", **own, "model": "base", "sampling": {}, "seed": 0,
              "prompt": prompt, "choices": [choice]}  # fmt: skip
    verdict = {k: one[k] for k in ("rating", "correction") if k in one}
    feedback = {"kind": "feedback", **own, "choice": 0, **verdict}
    return f"{json.dumps(answer)}\n{json.dumps(feedback)}\n"
