"""With every recipe a small model learns as its bf16 twin does; without scales it does not."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.ops import fp8
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from tests.support import toy
from tests.support.pool import RankPool

VOCAB, ROWS, TOKENS, STEPS, LAST = 61, 16, 32, 100, 20
# Gradients are those of a global batch of a million tokens, which divides them by their number:
# 512 tokens are computed, and the loss is weighted for the rest.
WEIGHT = 512 / 2**20
MODEL = toy.llama(
    num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=2, ffn_size=128, vocab_size=VOCAB
)


def batch(number: int) -> MicroBatch:
    """Rows that count upwards by a stride of their own, with a random jump in ten.

    An embedding and a head alone cannot know the stride: attention has to.
    """
    g = torch.Generator().manual_seed(number)
    stride = torch.randint(1, 4, (ROWS, 1), generator=g)
    jump = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=g)
    moves = torch.where(torch.rand(ROWS, TOKENS, generator=g) < 0.9, stride, jump)
    first = torch.randint(0, VOCAB, (ROWS, 1), generator=g)
    ids = torch.cat([first, moves], dim=1).cumsum(1) % VOCAB
    return dataclasses.replace(
        toy.batch(ROWS, tokens=TOKENS, vocab=VOCAB),
        input_ids_BT=ids[:, :-1].contiguous(),
        targets_BT=ids[:, 1:].contiguous(),
        loss_mask_BT=torch.ones(ROWS, TOKENS, dtype=torch.bool),
    )


def _all_scales_one() -> Iterator[Any]:
    real = fp8.e8m0_from_amax
    yield mock.patch.object(fp8, "scale_from_amax", lambda a, *_, **__: torch.ones_like(a))
    yield mock.patch.object(fp8, "delayed_update", lambda h, s, a, r: (h, torch.ones_like(s)))
    yield mock.patch.object(
        fp8, "e8m0_from_amax", lambda a, d: real(torch.full_like(a, fp8.MAX[d]), d)
    )


def learn(recipe: str | None, scaled: bool = True) -> float:
    """The mean loss of the last updates."""
    section = {"recipe": recipe, "amax_history_len": 4, "first_layers": 0, "last_layers": 0}
    config = {"layout": "dp1", "compile": False, "precision": "bf16", "max_grad_norm": 0.0}
    engine = NativeConfig.model_validate(config | {"fp8": section if recipe else None})
    mesh = build_mesh(parse_layout("dp1", 1), torch.device("cpu"))
    optimizer = AdamWConfig(weight_decay=0.0, eps=1e-12)
    objective = CausalLM()
    objective.weights = {"loss": WEIGHT}
    it = NativeEngine(MODEL, engine, mesh, seed=7, stage="test", optimizer=optimizer)
    losses = []
    with contextlib.ExitStack() as stack:
        for patch in () if scaled else _all_scales_one():
            stack.enter_context(patch)
        for number in range(STEPS):
            losses.append(it.forward_backward([batch(number)], objective)["loss"] / WEIGHT)
            it.step(1e-2 * min(1.0, (number + 1) / 10) * (1.0 - 0.9 * number / STEPS))
    return sum(losses[-LAST:]) / LAST


@pytest.fixture(scope="module")
def twin(ranks: RankPool) -> float:
    [loss] = ranks.run(learn, None, world=1)
    assert loss < math.log(VOCAB) / 2  # at least half the way
    return loss


def criterion(loss: float, twin: float) -> bool:
    return abs(loss - twin) <= 0.01 * twin


RECIPES = ("delayed", "current", "block", "mxfp8")

pytestmark = pytest.mark.slow  # a hundred steps each


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_learns_as_its_bf16_twin(ranks: RankPool, twin: float, recipe: str) -> None:
    [loss] = ranks.run(learn, recipe, world=1)
    assert criterion(loss, twin), (loss, twin)


@pytest.mark.parametrize("recipe", RECIPES)
def test_with_all_scales_one_it_does_not(ranks: RankPool, twin: float, recipe: str) -> None:
    [loss] = ranks.run(learn, recipe, False, world=1)
    assert not criterion(loss, twin) and loss > twin
