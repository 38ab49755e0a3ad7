"""Blocks with adapters trace without a break, their dropout's keys and DoRA's norms included."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch

from tests.adapters.support import adapter, plain, train, train_native, worst
from tests.support import toy
from tests.support.pool import RankPool


def train_traced(*args: Any) -> dict[str, torch.Tensor]:
    """As compiled blocks are traced, without a compiler behind."""
    traced = functools.partial(torch.compile, backend="aot_eager")
    with mock.patch.object(torch, "compile", traced):
        return train_native(*args, compile=True)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(ranks: RankPool) -> None:
    model = toy.llama(num_layers=1)
    asked = adapter("dora", init="pissa", dropout=0.2)
    wanted = train(plain(model, asked))
    for found in ranks.run(train_traced, model, asked, "tp2.sp", 2, world=2):
        error, name = worst(found, wanted)
        assert error < 1e-9, name
