"""The last passes: every word is in them, and logits are where fp64 has no exponentials."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.checkpoint import adapted
from shardwise.models import registry
from shardwise.models.dense.llama import LlamaConfig
from shardwise.verify import extremes

MODEL = LlamaConfig(
    family="llama",
    vocab_size=70,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=48,
)
BEYOND = 745.0  # exp of less is zero in fp64, and of more than 710 infinite


def engine_of(rank: int = 0, size: int = 1, model: LlamaConfig = MODEL) -> Any:
    named = list(adapted.initial_tensors(model, 0))
    return SimpleNamespace(
        data_rank=rank,
        data_size=size,
        full=lambda kind: ((name, value.double()) for name, value in named),
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_word_once_in_and_out_over_all_data_ranks(size: int) -> None:
    found = [b for r in range(size) for b in extremes.extreme_batches(engine_of(r, size), MODEL, 2)]
    assert len(found) == 2 * size and len({b.num_rows for b in found}) == 1
    for field in ("input_ids_BT", "targets_BT"):
        words = torch.cat([getattr(b, field)[b.loss_mask_BT] for b in found])
        assert sorted(words.tolist()) == list(range(MODEL.vocab_size))
    samples = torch.cat([b.sample_ids_B for b in found])
    assert samples.unique().numel() == samples.numel()


def test_a_rank_outside_of_an_engine_has_no_rows() -> None:
    assert extremes.extreme_batches(engine_of(rank=-1, size=2), MODEL, 2) == []


def test_a_row_begins_documents_where_another_does_not() -> None:
    [batch] = extremes.extreme_batches(engine_of(), MODEL, 1)
    assert batch.segment_ids_BT is not None
    first_R = batch.segment_ids_BT.argmax(dim=1)
    assert len(set(first_R.tolist())) == len(first_R) > 2
    assert all(int(first) % 4 == 0 for first in first_R)
    for position_T, first in zip(batch.position_ids_BT, first_R.tolist(), strict=True):
        assert position_T[first] == 0 and position_T[first - 1] == first - 1


def logits_of(model: LlamaConfig) -> Tensor:
    named = dict(engine_of(model=model).full("weights"))
    new = dict(extremes.extreme_weights(engine_of(model=model), model))
    assert {n.rpartition("layers.")[2] for n in new} >= {"0.attn.q.weight", "1.attn.k.weight"}
    plain = registry.build(model).double()
    plain.load_state_dict(named | new, strict=False)
    [batch] = extremes.extreme_batches(engine_of(), model, 1)
    with torch.no_grad():
        inputs = (batch.input_ids_BT, batch.position_ids_BT, batch.segment_ids_BT)
        return plain(*inputs)[batch.loss_mask_BT].max(-1).values


def test_the_largest_logits_are_far_below_and_far_above() -> None:
    tied = logits_of(MODEL.model_copy(update={"tie_embeddings": True}))
    assert bool((tied < -BEYOND).all())
    both = logits_of(MODEL.model_copy(update={"tie_embeddings": False}))
    assert bool((both.abs() > BEYOND).all()) and 0 < int((both > 0).sum()) < len(both)
