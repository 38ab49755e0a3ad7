"""The command line, called within the test's process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwise.cli.main import main

Command = Callable[..., tuple[int, str, str]]

RECIPE = """\
name: tiny
run_dir: {folder}/run
model:
  family: llama
  hidden_size: 16
  num_layers: 2
  num_heads: 2
  num_kv_heads: 1
  ffn_size: 32
  max_seq_len: 64
engine: {{compile: false}}
stages:
  - kind: pretrain
    steps: {steps}
    batch: {{global_batch: 4, micro_batch: 2, seq_len: 16}}
    data:
      sources: [{{kind: text, path: {folder}/train.txt}}]
      validation: [{{kind: text, path: {folder}/validation.txt}}]
"""


def write_recipe(folder: Path, steps: int = 2) -> Path:
    """A recipe that trains in a second, and its two files of text."""
    for name in ("train", "validation"):
        (folder / f"{name}.txt").write_text(f"{name}: the quick brown fox jumps. " * 40)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(folder=folder, steps=steps))
    return path


@pytest.fixture
def shardwise(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """``shardwise("checkpoint", "verify", path)`` gives exit code, stdout and stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["shardwise", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return call
