"""Communication of one update against the published formulas. Bytes are of fp64 runs: 8 each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.ops import comm
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from tests.support import toy
from tests.support.pool import RankPool

# Sizes that every cut divides, so that there is no padding to account for.
LAYERS, ROWS, TOKENS, WORDS = 4, 4, 16, 64
MODEL = toy.llama(num_layers=LAYERS, vocab_size=WORDS, tie_embeddings=False)
WIDTH, KV = MODEL.hidden_size, MODEL.num_kv_heads * MODEL.head_width
P = MODEL.num_parameters()
HIDDEN = ROWS * TOKENS * WIDTH
BYTES = 8


def _count(layout: str, micro: int) -> dict[tuple[str, str], tuple[int, float]]:
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    config = NativeConfig(layout=layout, precision="fp64", compile=False)
    engine = NativeEngine(MODEL, config, mesh, seed=0, optimizer=AdamWConfig())
    batch = toy.batch(ROWS * engine.data_size, TOKENS, WORDS)
    batch.loss_mask_BT.fill_(True)
    rows = slice(engine.data_rank * ROWS, (engine.data_rank + 1) * ROWS)
    microbatches = batch.map(lambda t: t[rows]).split(micro)
    engine.forward_backward(microbatches, CausalLM())
    engine.step(1e-3)
    with comm.tally() as tally:
        engine.forward_backward(microbatches, CausalLM())
        engine.step(1e-3)
    return {k: (tally.calls[k], tally.bytes[k] / BYTES) for k in tally.calls}


def _one(ranks: RankPool, layout: str, world: int, micro: int = ROWS) -> dict[Any, Any]:
    found = ranks.run(_count, layout, micro, world=world)
    return found[0]  # type: ignore[no-any-return]


def test_tensor_parallel_has_four_all_reduces_a_layer(ranks: RankPool) -> None:
    """Shoeybi et al. 2019, section 3: two forward, two backward, of B T D each.

    Besides: the embedding's output, the gradient behind the last norm, and three numbers a token
    for the loss.
    """
    found = _one(ranks, "tp2", 2)
    loss = ROWS * TOKENS
    calls, elements = found["tp", "all_reduce"]
    assert calls == 4 * LAYERS + 2 + 2  # the loss takes a maximum, and two sums at once
    assert elements == (4 * LAYERS + 2) * HIDDEN + 3 * loss
    assert set(found) == {("tp", "all_reduce")}


def test_sequence_parallel_moves_as_much_in_other_collectives(ranks: RankPool) -> None:
    """Korthikanti et al. 2022, section 4.2.2: an all-reduce is a reduce-scatter and an all-gather.

    The norms' gradients are partial sums: one more all-reduce, of all of them.
    """
    found = _one(ranks, "tp2.sp", 2)
    # Per layer: a gather in front of attention and of the feed-forward, a scatter behind each, and
    # their conjugates. Embedding out, head in: a pair each.
    pair = (4 * LAYERS + 2, (4 * LAYERS + 2) * HIDDEN)
    assert found["tp", "all_gather"] == pair
    assert found["tp", "reduce_scatter"] == pair
    norms = (2 * LAYERS + 1) * WIDTH
    assert found["tp", "all_reduce"] == (3, 3 * ROWS * TOKENS + norms)


@pytest.mark.parametrize("micro", [ROWS, ROWS // 2])
def test_zero_moves_two_parameter_volumes_and_zero3_three(ranks: RankPool, micro: int) -> None:
    """Rajbhandari et al. 2020, section 7: 2 P a step, and 3 P with parameters partitioned.

    ZeRO-2 and 3 reduce each micro-batch, and ZeRO-3 gathers it twice (but for the embedding, the
    last norm and the head, which it keeps between forward and backward).
    """
    times = ROWS // micro
    ends = 2 * WORDS * WIDTH + WIDTH
    one = _one(ranks, "dp2.zero1", 2, micro)
    assert one["shard", "all_gather"][1] == P
    assert one["shard", "reduce_scatter"][1] == P
    two = _one(ranks, "dp2.zero2", 2, micro)
    assert two["shard", "all_gather"][1] == P
    assert two["shard", "reduce_scatter"][1] == times * P
    three = _one(ranks, "dp2.zero3", 2, micro)
    assert three["shard", "all_gather"][1] == times * 2 * (P - ends) + times * ends
    assert three["shard", "reduce_scatter"][1] == times * P


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_hybrid_sharding_all_reduces_a_shard(ranks: RankPool, zero: int) -> None:
    """Zhao et al. 2023, "PyTorch FSDP", section 3.2.2: what a shard group's reduction leaves.

    ZeRO-2 and 3 reduce each micro-batch; without ZeRO, a rank's shard is everything.
    """
    layout = f"dp4.hsdp2.zero{zero}" if zero else "dp2.zero0"
    found = _one(ranks, layout, 4 if zero else 2, ROWS // 2)
    times = 2 if zero >= 2 else 1
    assert found["replicate", "all_reduce"][1] == times * P / (2 if zero else 1)
    if zero:
        assert found["shard", "reduce_scatter"][1] == times * P


def test_a_pipelines_replicas_are_counted(ranks: RankPool) -> None:
    found = ranks.run(_count, "dp2.zero0.pp2.1f1b", ROWS // 2, world=4)
    of_stages = [f["replicate", "all_reduce"][1] for f in found]
    assert sum(of_stages) == 2 * P


def test_ring_sends_keys_and_values_round(ranks: RankPool) -> None:
    """Liu et al. 2023, section 3: keys and values visit every rank; backward again, and their
    gradients with one hop more, home."""
    for size in (2, 4):
        found = _one(ranks, f"cp{size}.ring", size)
        block = 2 * ROWS * (TOKENS // size) * KV
        hops = (size - 1) + (size - 1) + size
        assert found["cp", "send"] == (2 * LAYERS * hops, LAYERS * hops * block)
        # Log-probabilities, one a token.
        assert found["cp", "all_gather"] == (1, ROWS * TOKENS)


def test_ulysses_exchanges_four_tensors(ranks: RankPool) -> None:
    """Jacobs et al. 2023, section 3: queries, keys, values and outputs, forward and backward."""
    found = _one(ranks, "cp2.ulysses", 2)
    part = ROWS * (TOKENS // 2)
    assert found["cp", "all_to_all"] == (2 * 4 * LAYERS, 2 * LAYERS * part * (2 * WIDTH + 2 * KV))


def test_pipeline_sends_activations_and_their_gradients(ranks: RankPool) -> None:
    """Narayanan et al. 2021, section 2.2: B T D a micro-batch at each cut, either way."""
    found = ranks.run(_count, "pp2.1f1b", 1, world=2)
    assert found[0]["pp", "send"] == (ROWS, HIDDEN)  # forward
    assert found[1]["pp", "send"] == (ROWS, HIDDEN)  # backward
    loop = ranks.run(_count, "pp2.interleaved.v2", 1, world=2)
    assert sum(f["pp", "send"][1] for f in loop) == 3 * 2 * HIDDEN
