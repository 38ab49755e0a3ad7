"""Parts of a tensor as regions, each in memory of its own."""

from __future__ import annotations

import pytest
import torch

from shardwise.ops.local_shards import local_shards
from shardwise.ops.region_shards import RegionShards
from shardwise.ops.regions import Region

FIRST, SECOND = Region((0, 1), (1, 3)), Region((2, 0), (2, 4))


def shards() -> tuple[RegionShards, list[torch.Tensor]]:
    memory = [torch.arange(3.0).view(1, 3), torch.arange(8.0).view(2, 4)]
    found = RegionShards(list(zip((FIRST, SECOND), memory, strict=True)), (4, 4), memory[0], cut=0)
    return found, memory


def test_it_is_the_global_tensor_and_its_regions_are_live() -> None:
    tensor, memory = shards()
    assert tensor.shape == (4, 4) and tensor.dtype == torch.float32 and tensor.cut == 0
    assert "(2, 0)" in repr(tensor)
    for shard, region, own in zip(local_shards("x", tensor), (FIRST, SECOND), memory, strict=True):
        assert shard.region == region
        shard.view.add_(1)
        assert own.flatten()[0] == 1
    assert tensor.to_local().tolist() == [1, 2, 3, *range(1, 9)]


def test_clone_detach_and_copy_are_of_every_region() -> None:
    tensor, memory = shards()
    kept = tensor.clone()
    tensor.detach().parts[1][1].zero_()
    assert memory[1].sum() == 0 and kept.parts[1][1].sum() == 28 and kept.cut == 0
    tensor.copy_(kept)
    assert memory[1].sum() == 28
    with pytest.raises(NotImplementedError, match="gather it"):
        tensor + 1


def test_nothing_may_be_here() -> None:
    tensor = RegionShards([], (4, 4), torch.empty(0, dtype=torch.float64))
    assert tensor.shape == (4, 4) and local_shards("x", tensor) == []
    assert tensor.to_local().shape == (0,) and tensor.to_local().dtype == torch.float64
