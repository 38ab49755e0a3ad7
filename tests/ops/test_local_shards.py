"""Which positions a rank holds, against the way FSDP2 and tensor parallelism cut for real."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardwise.errors import CheckpointError
from shardwise.ops.local_shards import local_positions, local_shards


def part(tensor: torch.Tensor, dim: int, count: int, index: int) -> torch.Tensor:
    chunks = tensor.chunk(count, dim) if tensor.shape[dim] else ()
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


@given(
    st.tuples(st.integers(0, 13), st.integers(1, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([0, 1]),
    st.sampled_from([0, 1, None]),
)
def test_fsdp_over_tensor_parallel_in_any_uneven_size(
    shape: tuple[int, int], mesh: tuple[int, int, int], fsdp_dim: int, tp_dim: int | None
) -> None:
    """Mesh (replicate, fsdp, tp): tensor parallel cuts first, FSDP2 cuts what is left."""
    tensor = torch.arange(shape[0] * shape[1]).reshape(shape)
    num_tp = mesh[2]
    fsdp = _StridedShard(fsdp_dim, split_factor=num_tp) if tp_dim == fsdp_dim else Shard(fsdp_dim)
    tp = Replicate() if tp_dim is None else Shard(tp_dim)
    for coordinate in itertools.product(*map(range, mesh)):
        expected = tensor if tp_dim is None else part(tensor, tp_dim, num_tp, coordinate[2])
        expected = part(expected, fsdp_dim, mesh[1], coordinate[1])
        rows, columns = (
            [i for a, b in dim for i in range(a, b)]
            for dim in local_positions(shape, mesh, coordinate, (Replicate(), fsdp, tp))
        )
        assert torch.equal(tensor[rows][:, columns], expected)


def test_two_axes_on_one_dimension_cut_from_left_to_right() -> None:
    held = [
        local_positions([10], (2, 3), (i, j), (Shard(0), Shard(0)))[0]
        for i in range(2)
        for j in range(3)
    ]
    assert held == [[(0, 2)], [(2, 4)], [(4, 5)], [(5, 7)], [(7, 9)], [(9, 10)]]


def test_a_strided_shard_without_its_counterpart_is_several_boxes() -> None:
    held = local_positions([8], (2,), (1,), (_StridedShard(0, split_factor=2),))
    assert held == [[(2, 4), (6, 8)]]


def test_pending_reductions_are_refused() -> None:
    with pytest.raises(ValueError, match="pending reduction"):
        local_positions([8], (2,), (0,), (Partial(),))


def test_what_has_no_dense_values_is_refused() -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        with pytest.raises(CheckpointError, match="weight"):
            local_shards("weight", tensor)
