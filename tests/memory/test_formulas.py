"""Memory formulas against counts by hand, published figures, and what must hold for any numbers.

That they describe the running engine is checked in tests/benchmarks/test_layouts.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.memory import ModelShape, Part, Place, Work, activations, occupancy
from shardwise.memory.formulas import backward_buffers, loss_buffers, reduce_buffers, transit
from shardwise.memory.parameters import held, trained
from shardwise.models.dense.llama import LlamaConfig

# Divisible by all that the layouts below divide by, so that nothing is padded.
EVEN = ModelShape(64, 4, 8, 8, 8, 128, 512)
WORK = Work(seq_len=4096, micro_batch=2)


def whole(model: ModelShape, **numbers: Any) -> Place:
    """A place that holds all layers."""
    return Place((Part(model.num_layers),), **numbers)


@st.composite
def models(draw: st.DrawFn) -> ModelShape:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    return ModelShape(
        hidden_size=draw(st.integers(1, 100)),
        num_layers=draw(st.integers(1, 6)),
        num_heads=4 * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_width=2 * draw(st.integers(1, 8)),
        ffn_size=draw(st.integers(1, 100)),
        vocab_size=draw(st.integers(1, 300)),
        tied=draw(st.booleans()),
    )


@given(models())
def test_one_rank_holds_what_the_model_has(model: ModelShape) -> None:
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_width,
        ffn_size=model.ffn_size,
        vocab_size=model.vocab_size,
        tie_embeddings=model.tied,
        max_seq_len=8,
    )
    found = occupancy(model, whole(model), WORK)
    assert found.master_shards == found.gradients == 4 * config.num_parameters()
    assert found.optimizer_states == 8 * config.num_parameters()
    assert found.compute_copies == 2 * config.num_parameters()
    assert found.at_update == 16 * config.num_parameters()


@given(models(), st.sampled_from([1, 2, 3]), st.integers(2, 9))
def test_zero_cuts_states_and_pads_less_than_a_row_a_tensor(
    model: ModelShape, zero: int, ranks: int
) -> None:
    place = whole(model, dp=ranks, shard=ranks, zero=zero)
    padded = ranks * held(model, place) - held(model, whole(model))
    widest = max(model.hidden_size, model.ffn_size, model.num_heads * model.head_width)
    tensors = 9 * model.num_layers + 3
    assert 0 <= padded <= tensors * (ranks - 1) * widest


def test_zero_paper_figure_1() -> None:
    # Rajbhandari et al. 2020: 12 bytes a parameter of masters and Adam, cut by 64 ranks.
    parameters = held(EVEN, whole(EVEN))
    found = occupancy(EVEN, whole(EVEN, dp=64, shard=64, zero=1), WORK)
    assert found.master_shards + found.optimizer_states == 12 * parameters / 64
    assert found.compute_copies == 2 * parameters


@given(models(), st.integers(1, 3), st.integers(1, 4))
def test_zero3_gathers_no_more_than_zero1(model: ModelShape, ranks: int, batches: int) -> None:
    work = dataclasses.replace(WORK, micro_batches=batches)
    one, three = (
        occupancy(model, whole(model, dp=2 * ranks, shard=2 * ranks, zero=z), work) for z in (1, 3)
    )
    assert three.compute_copies <= one.compute_copies
    assert three.master_shards == one.master_shards
    for found in (one, three):
        assert found.peak_gradients >= found.gradients


def test_only_zero0_replicates_states() -> None:
    found = [
        occupancy(EVEN, whole(EVEN, dp=4, shard=4 if z else 1, zero=z), WORK) for z in range(4)
    ]
    parameters = held(EVEN, whole(EVEN))
    assert [f.master_shards for f in found] == [4 * parameters] + 3 * [parameters]
    # A shard group smaller than the data ranks, and context ranks, which are data ranks to ZeRO.
    assert held(EVEN, whole(EVEN, dp=4, shard=2)) == parameters / 2
    assert held(EVEN, whole(EVEN, dp=2, shard=2, cp=2)) == parameters / 4


def test_tensor_parallel_cuts_all_but_norms_and_shared_heads() -> None:
    norms = (2 * EVEN.num_layers + 1) * EVEN.hidden_size
    parameters = held(EVEN, whole(EVEN))
    assert held(EVEN, whole(EVEN, tp=4)) == (parameters - norms) / 4 + norms
    shared = dataclasses.replace(EVEN, num_kv_heads=2)
    kv = 2 * EVEN.num_layers * 2 * EVEN.head_width * EVEN.hidden_size  # whole on each of 4 ranks
    rest = held(shared, whole(shared)) - norms - kv
    assert held(shared, whole(shared, tp=4)) == rest / 4 + norms + kv


@given(models(), st.integers(2, 4))
def test_pipeline_parts_add_up(model: ModelShape, pp: int) -> None:
    model = dataclasses.replace(model, num_layers=pp + model.num_layers)
    sizes = [1] * (pp - 1) + [model.num_layers - pp + 1]
    places = [Place((Part(n, first=i == 0, last=i == pp - 1),), pp=pp) for i, n in enumerate(sizes)]
    table = model.vocab_size * model.hidden_size * model.tied  # at both ends
    assert sum(held(model, p) for p in places) == held(model, whole(model)) + table
    # In a V, one rank has both ends; the copy is not trained.
    v = Place((Part(1, last=False), Part(1, first=False)), pp=pp)
    assert held(model, v) - trained(model, v) == table


def test_a_block_by_hand() -> None:
    # bf16 elements a token: 2 norms x (fp32 in and out) = 8 d, two product inputs 2 d, attention
    # q + k + v + 2 x out = 5 d, feed-forward 4 f; fp32: 1 / rms of 2 norms, a log-sum-exp a head.
    d, f, tokens = EVEN.hidden_size, EVEN.ffn_size, 2 * 4096
    expected = tokens * (2 * (8 * d + 2 * d + 5 * d + 4 * f) + 4 * (2 + EVEN.num_heads))
    assert activations.block(EVEN, whole(EVEN), WORK) == expected
    # Heads of 16 on CPU: our kernel leaves its result as the next product wants it.
    model = dataclasses.replace(EVEN, num_heads=4, num_kv_heads=4, head_width=16)
    saved = tokens * (2 * d + 4 * (EVEN.num_heads - 4))
    assert activations.block(model, whole(model), WORK) == expected - saved
    cuda = dataclasses.replace(WORK, device="cuda")
    assert activations.block(model, whole(model), cuda) == expected - saved + tokens * 2 * d


def test_sequence_parallelism_cuts_what_norms_keep() -> None:
    plain, cut = whole(EVEN, tp=4), whole(EVEN, tp=4, sp=True)
    norm = 2 * 4096 * 4 * (2 * EVEN.hidden_size + 1)
    saved = activations.block(EVEN, plain, WORK) - activations.block(EVEN, cut, WORK)
    assert saved == 2 * norm * 3 / 4


@given(models(), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([2, 4, 8]))
def test_recompute_keeps_less(model: ModelShape, tp: int, sp: bool, width: int) -> None:
    place = whole(model, tp=tp, sp=sp and tp > 1)
    kept = []
    for recompute in ("full", "selective", "none"):
        work = dataclasses.replace(WORK, compute_bytes=width, recompute=recompute)
        kept.append(activations.kept(model, place, work))
        again = activations.peak(model, place, work) - kept[-1]
        assert again == (0 if recompute == "none" else activations.block(model, place, work))
    # Where the feed-forward is tiny, keeping results of width d costs more than the norms do.
    assert kept[0] < kept[1]
    assert kept[0] < kept[2]


@given(models(), st.integers(1, 6))
def test_activations_grow_with_what_is_in_flight(model: ModelShape, flying: int) -> None:
    one = Place((Part(model.num_layers, last=False),), pp=2)
    some = Place((Part(model.num_layers, last=False, together=flying),), pp=2)
    assert activations.kept(model, some, WORK) == flying * activations.kept(model, one, WORK)


def test_logits_and_messages_by_hand() -> None:
    place = Place((Part(2, first=False, in_flight=3),), pp=2)
    logits = 2 * 4096 * EVEN.vocab_size * 2
    assert loss_buffers(EVEN, place, WORK, place.parts[0]) == (3 + 1) * logits
    gpu = dataclasses.replace(WORK, device="cuda")
    chunk = 4 * 2 * 4096 * EVEN.vocab_size  # all of the logits, in fp32
    assert loss_buffers(EVEN, place, gpu, place.parts[0]) == (3 + 1) * logits + chunk
    # Five fp32 tensors of a norm's backward pass (its sum beats 3 x 128 bf16), and the gradient.
    width = 5 * 4 * EVEN.hidden_size + 2 * EVEN.hidden_size
    assert backward_buffers(EVEN, place, WORK, place.parts[0]) == 2 * 4096 * width
    message = 2 * 4096 * EVEN.hidden_size * 2
    assert transit(EVEN, dataclasses.replace(place, messages=3), WORK) == 3 * message
    assert transit(EVEN, whole(EVEN), WORK) == 0
    wide = dataclasses.replace(WORK, wide_logits=True)
    assert loss_buffers(EVEN, place, wide, place.parts[0]) == 8 * logits


def test_messages_go_by_blocks_on_gpus_and_under_zero3() -> None:
    gpu, block = dataclasses.replace(WORK, device="cuda"), 4 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    one, three = (whole(EVEN, dp=2, shard=2, zero=z) for z in (1, 3))
    part = one.parts[0]
    assert reduce_buffers(EVEN, one, WORK, part) == 2 * 4 * held(EVEN, whole(EVEN))
    # Beside a block: the gradient that enters it, a tied head's, under ZeRO-3 the next weights.
    beside = 2 * (2 * 4096 * 64 + 512 * 64)
    assert reduce_buffers(EVEN, one, gpu, part) == block + beside
    assert reduce_buffers(EVEN, three, gpu, part) == block + beside + block // 2
    assert reduce_buffers(EVEN, three, WORK, part) == 2 * block + beside + block // 2
    assert occupancy(EVEN, one, gpu).compute_copies == 2 * held(EVEN, whole(EVEN))


@pytest.mark.parametrize("numbers", [{"tp": 0}, {"zero": 4}, {"dp": 4, "shard": 3}, {"parts": ()}])
def test_numbers_of_no_layout_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no layout"):
        Place(**{"parts": (Part(1),)} | numbers)
