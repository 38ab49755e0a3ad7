"""The formulas of what optimizers keep, against optimizers that are built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwise.config.schema import StageConfig
from shardwise.memory import Part, Place, Work, occupancy
from shardwise.memory.optimizers import KINDS, optimizer_states
from shardwise.models import registry
from shardwise.optim.build import build_optimizer
from shardwise.parallel.memory_inputs import model_shape
from tests.support import toy

MODEL = toy.llama(hidden_size=64, ffn_size=96, vocab_size=300)
WORK = Work(seq_len=8, micro_batch=1, compute_bytes=4)


def built(kind: str) -> int:
    """Bytes of an optimizer's states, its counters left out."""
    keys: dict[str, Any] = {"kind": kind}
    if kind == "plain_sgd":
        keys = {"kind": "sgd", "momentum": 0.0}
    stage = StageConfig.model_validate({"kind": "any", "steps": 1, "optimizer": keys})
    named = registry.build(MODEL).named_parameters()
    optimizer = build_optimizer(named, stage.optimizer)
    kept = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_what_is_built(kind: str) -> None:
    torch.manual_seed(0)
    place = Place((Part(MODEL.num_layers),))
    assert optimizer_states(model_shape(MODEL), place, WORK, kind) == built(kind)


def test_eight_bits_are_a_quarter_and_lomo_is_below_sgd() -> None:
    shape = model_shape(toy.llama(hidden_size=512, ffn_size=1536, num_layers=8, vocab_size=4096))
    for dp in (1, 2, 4):
        place = Place((Part(8),), dp=dp, shard=dp)
        found = {k: occupancy(shape, place, WORK, k) for k in ("adamw", "adamw8bit", "sgd", "lomo")}
        states = {k: f.optimizer_states for k, f in found.items()}
        assert states["adamw8bit"] < 0.29 * states["adamw"]
        assert dp > 1 or states["adamw8bit"] < 0.26 * states["adamw"]
        lomo, sgd = found["lomo"], found["sgd"]
        assert lomo.at_update + lomo.peak_gradients < 0.8 * (sgd.at_update)
        assert lomo.gradients == lomo.optimizer_states == 0
