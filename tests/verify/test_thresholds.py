"""Thresholds that are lowered for a small recipe, and are back behind it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from shardwise import checkpoint
from shardwise.checkpoint import loading, manifest, saving, writer
from shardwise.engines import plain_optimizers, plain_quantised
from shardwise.ops import nf4
from shardwise.optim import blockwise
from shardwise.parallel import data
from shardwise.verify.thresholds import (
    OF_BOTH,
    OF_CHECKPOINTS,
    OF_MODELS,
    OF_UPDATES,
    lowered,
)

ALL = {**OF_BOTH, **OF_MODELS, **OF_CHECKPOINTS, **OF_UPDATES}


@pytest.mark.parametrize(("module", "name"), ALL)
def test_every_threshold_is_one_of_the_source(module: str, name: str) -> None:
    value = ALL[module, name]
    before = getattr(importlib.import_module(f"shardwise.{module}"), name)
    assert type(value) is type(before) and value != before


def test_whoever_imported_a_threshold_sees_it_lowered_and_back_again() -> None:
    before = manifest.BLOCK_BYTES
    with lowered(OF_CHECKPOINTS):
        assert manifest.BLOCK_BYTES == writer.BLOCK_BYTES == saving.BLOCK_BYTES < before
        assert {"cpu"} == data.SHARDED_WHOLE
    assert manifest.BLOCK_BYTES == writer.BLOCK_BYTES == saving.BLOCK_BYTES == before
    with lowered(OF_CHECKPOINTS, OF_UPDATES):
        assert not data.SHARDED_WHOLE
    assert {"cpu"} == data.SHARDED_WHOLE


def test_what_is_saved_in_small_blocks_is_read_in_small_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read_into = loading.read_into
    monkeypatch.setattr(
        loading, "read_into", lambda f, data, at: (reads.append(len(data)), read_into(f, data, at))
    )
    value = torch.randn(600, 30)
    with lowered(OF_CHECKPOINTS):
        path = checkpoint.save(tmp_path, 1, {"w": value}, {})
        with loading.Reader(path, manifest.read(path), True) as reader:
            part = torch.empty(600, 7)
            shard = loading.LocalShard(loading.Region((0, 11), (600, 7)), part)
            reader.fill("w", shard)
    assert torch.equal(part, value[:, 11:18])
    assert len(reads) > 5 and max(reads) < 1 << 15


def test_the_oracle_has_the_blocks_of_what_it_is_compared_with() -> None:
    with lowered(OF_BOTH):
        assert plain_quantised.NESTED_BLOCK == nf4.NESTED_BLOCK
        for name in ("BLOCK", "LEAST"):
            assert getattr(plain_optimizers, name) == getattr(blockwise, name)
            assert OF_BOTH["optim.blockwise", name] == getattr(blockwise, name)
