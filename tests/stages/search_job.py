"""Recipes of search, and what their tests do inside rank processes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from shardwise.config.load import load_config
from shardwise.data.tokenizer import Tokenizer
from shardwise.search.scorers import Verifier
from shardwise.stages.run import run_rank
from shardwise.verify.jobs import killed_behind
from tests.stages.recipes import recipe

LETTERS = "abcd\u0434\u0436\u0437\u0438;\n"


NATIVE = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1}  # widths of the native step


def made(
    folder: Path, *stages: dict[str, Any], kind: str = "mcts", native: bool = False
) -> dict[str, Any]:
    """A recipe that searches with an untrained model, which writes letters of `talkative`."""
    methods: dict[str, Any] = {
        "best_of_n": {"kind": "best_of_n", "samples": 6},
        "mcts": {"kind": "mcts", "simulations": 12, "expand": 3, "budget_tokens": 300},
        "dvts": {"kind": "dvts", "samples": 6, "width": 3},
        "beam": {"kind": "beam", "samples": 6, "width": 3},
    }
    search = {
        "kind": "search",
        "task": {"kind": "arithmetic", "operations": ["add"], "max_digits": 1},
        "num_problems": 5,
        "method": methods[kind],
        "scorer": {"kind": "rollouts", "samples": 2},
        "step": {"separator": ";", "max_step_tokens": 8, "max_depth": 4},
        "sampling": {"max_new_tokens": 16, "stop_strings": ["\n"]},
        "reward": {"parts": [{"kind": "language"}]},  # the share of Latin letters
        "chunk": 2,
    }
    found = recipe(folder)
    found["model"] |= NATIVE if native else {}
    return found | {"stages": [search, *stages]}


@contextlib.contextmanager
def talkative() -> Any:
    """The untrained model's tokens, read as letters that make steps and answers."""

    def decode(self: Tokenizer, ids: Sequence[int], *args: Any, **kwargs: Any) -> str:
        return "".join(LETTERS[i % len(LETTERS)] for i in ids)

    with mock.patch.object(Tokenizer, "decode", decode):
        yield


def run(config: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """One rank of the run; returns its summary."""
    torch.set_num_threads(1)
    with talkative():
        return run_rank(load_config(config, overrides))


def run_and_die(config: dict[str, Any], parts: int) -> None:
    """One rank of a run that is killed behind so many parts of its jobs."""
    with killed_behind(parts):
        run(config)


def written(folder: Path, job: str = "search") -> dict[str, bytes]:
    """Every artifact's bytes."""
    artifacts = folder / "stages" / job / "artifacts"
    return {path.stem: path.read_bytes() for path in sorted(artifacts.iterdir())}


def run_with_odd_verifiers(config: dict[str, Any]) -> None:
    """The same, where the verifier of a rank that does not speak for its group scores nothing."""
    score = Verifier.__call__

    def odd(self: Verifier, paths: Sequence[Any]) -> list[float | None]:
        tp = config["stages"][0]["rollout"]["tp"]
        return [None for _ in paths] if dist.get_rank() % tp else score(self, paths)

    with mock.patch.object(Verifier, "__call__", odd):
        run(config)
