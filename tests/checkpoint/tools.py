"""What the checkpoint tests share: tiny checkpoints whose content tells their step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise import checkpoint
from shardwise.checkpoint import Writer

FILES = {"config.json": b'{"hidden_size": 4}', "tokenizer/tokenizer.json": b'{"model": {}}'}


def content(step: int) -> dict[str, Tensor]:
    """Tensors of several dtypes and shapes, a pure function of the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.embed.weight": torch.randn(64, 20, generator=generator),
        "model.norm.weight": torch.randn(20, generator=generator).bfloat16(),
        "model.tied.weight": torch.randn(6, 8, generator=generator).T,
        "optim.model.norm.weight.exp_avg": torch.randn(20, generator=generator),
        "optim.step": torch.tensor(float(step)),
        "model.mask": torch.rand(9, generator=generator) > 0.5,
        "model.empty": torch.empty(0, 3),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) for name, t in tensors.items()}


def save(root: Path, step: int, **options: Any) -> Path:
    return checkpoint.save(root, step, content(step), {"step": step}, FILES, **options)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def newest(root: Path) -> int:
    """The step of the newest checkpoint, after checking that all of it is what was saved."""
    into = blank(content(0))
    loaded = checkpoint.load_latest(root, into, strict=True)
    assert loaded is not None
    assert loaded.meta == {"step": loaded.step}
    assert_equal(into, content(loaded.step))
    return loaded.step


def patched(
    phase: str, act: Callable[[], object], *, number: int = 0, after: bool = False
) -> Writer:
    """A writer that acts before or after call ``number`` of one of its methods."""
    writer = Writer(sleep=lambda seconds: None)
    original = getattr(writer, phase)
    calls = iter(range(1_000_000))

    def method(*args: Any, **kwargs: Any) -> Any:
        due = next(calls) == number
        if due and not after:
            act()
        result = original(*args, **kwargs)
        if due and after:
            act()
        return result

    setattr(writer, phase, method)
    return writer


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
