"""Merging: the same function, taken out again bit by bit, and nothing merged by halves."""

from __future__ import annotations

import pytest
import torch

from shardwise.adapters.config import LowRankConfig
from shardwise.adapters.merge import merge, merge_in_place
from shardwise.adapters.targets import is_adapter, targets
from shardwise.errors import CheckpointError
from tests.adapters.support import adapter, plain, update
from tests.support import toy

MODEL = toy.llama(tie_embeddings=False)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_merged_computes_the_same_and_comes_out_again(kind: str) -> None:
    config = adapter(kind, targets=["all-linear", "head"])
    assert isinstance(config, LowRankConfig)
    engine = plain(MODEL, config)
    update(engine, 0)
    batch = toy.batch(2, 8)
    [adapted] = engine.forward([batch], lambda logits, _: logits)
    found = targets(MODEL, config)
    before = {n: t.clone() for n, t in engine.held("weights")}
    weights = dict(engine.held("weights"))
    served = dict(merge(engine.held("weights"), found, config))
    take_out = merge_in_place(weights, found, config)
    assert all(torch.equal(weights[n], t) for n, t in served.items())
    bare = plain(MODEL, config)
    bare.load_weights((n, t) for n, t in weights.items() if not is_adapter(n))
    if kind == "lora":  # whose B starts at zero: an adapter that does nothing
        [merged] = bare.forward([batch], lambda logits, _: logits)
        torch.testing.assert_close(merged, adapted, rtol=1e-10, atol=1e-12)
    take_out()
    assert all(torch.equal(t, before[n]) for n, t in engine.held("weights"))


def test_an_adapter_that_does_not_come_is_no_model() -> None:
    config = adapter()
    assert isinstance(config, LowRankConfig)
    engine = plain(MODEL, config)
    stream = [(n, t) for n, t in engine.held("weights") if n != "layers.1.mlp.up.adapter.B"]
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up.weight: its adapter did not come"):
        list(merge(stream, targets(MODEL, config), config))
    with pytest.raises(CheckpointError, match="an adapter of a weight that did not come before"):
        list(merge(reversed(stream), targets(MODEL, config), config))
