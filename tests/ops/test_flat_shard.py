"""Parts of a tensor that begin and end within a row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.ops.flat_shard import FlatShard
from shardwise.ops.local_shards import local_shards
from shardwise.ops.regions import tiling_problem

SHAPES = st.lists(st.integers(1, 5), max_size=4)


@given(SHAPES, st.data())
def test_parts_tile_the_tensor_and_are_live(shape: list[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    whole = torch.arange(float(count)).view(shape)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, count), max_size=4))), count]
    regions, memory = [], whole.flatten().clone()
    for start, stop in itertools.pairwise(cuts):
        shard = FlatShard(memory[start:stop], shape, start)
        assert (shard.shape, shard.dtype) == (whole.shape, whole.dtype)
        for region, view in local_shards("x", shard.clone()):
            at = tuple(slice(o, o + n) for o, n in zip(*region, strict=True))
            assert torch.equal(view, whole[at])
            regions.append(region)
        for _, view in local_shards("x", shard.detach()):
            view.neg_()
    assert tiling_problem(tuple(shape), regions) is None
    assert torch.equal(memory.view(shape), -whole)


def test_a_part_beyond_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="elements 3 to 7 of a tensor of"):
        FlatShard(torch.zeros(4), [2, 3], 3)


def test_there_is_no_arithmetic_on_a_part() -> None:
    with pytest.raises(NotImplementedError, match="gather it"):
        FlatShard(torch.zeros(4), [2, 3], 2) + 1
