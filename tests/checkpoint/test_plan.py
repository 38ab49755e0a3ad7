"""The plan writes every element once, evenly, and refuses what does not belong together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.checkpoint.plan import Holding, assign, holding_from_json, holdings
from shardwise.errors import CheckpointError
from shardwise.ops.regions import Region, full_region


def rows(name: str, start: int, stop: int, total: int, dtype: str = "F32") -> Holding:
    return Holding(name, dtype, (total, 2), (Region((start, 0), (stop - start, 2)),))


@given(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=8))
def test_each_box_is_written_once_by_one_of_its_holders(holders: list[set[int]]) -> None:
    by_rank = [
        [rows(f"t{i}", 0, i + 1, i + 1) for i, who in enumerate(holders) if rank in who]
        for rank in range(4)
    ]
    assigned = assign(by_rank)
    written = [
        by_rank[rank][index].name for rank, items in enumerate(assigned) for index, _ in items
    ]
    assert sorted(written) == sorted(f"t{i}" for i in range(len(holders)))


def test_replicated_tensors_are_spread_by_size() -> None:
    held = [rows(f"t{i}", 0, 10, 10) for i in range(8)]
    assert [len(items) for items in assign([held] * 4)] == [2, 2, 2, 2]


def test_replicas_go_to_the_rank_with_the_least_of_its_own() -> None:
    own, shared = rows("own", 0, 100, 100), rows("shared", 0, 10, 10)
    assert assign([[own, shared], [shared]]) == [[(0, 0)], [(0, 0)]]


def test_ranks_that_disagree_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"w: F32 .* on rank 0, BF16 .* on rank 1"):
        assign([[rows("w", 0, 4, 4)], [rows("w", 0, 4, 4, "BF16")]])
    with pytest.raises(CheckpointError, match="w: 4 of 8 elements are held by nobody"):
        assign([[rows("w", 0, 1, 4)], [rows("w", 3, 4, 4)]])
    with pytest.raises(CheckpointError, match=r"w: .* overlap"):
        assign([[rows("w", 0, 3, 4)], [rows("w", 1, 4, 4)]])


def test_holdings_survive_json_and_name_what_cannot_be_stored() -> None:
    held, memory = holdings({"a": torch.ones(2, 3), "b": torch.tensor(1.0), "c": torch.ones(0, 2)})
    assert [holding_from_json([*h.to_json()]) for h in held] == held
    assert held[0].regions == (full_region((2, 3)),) and held[2].regions == () and memory[2] == []
    with pytest.raises(CheckpointError, match=r"step: is a int, not a tensor"):
        holdings({"step": 3})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"z: torch.complex128"):
        holdings({"z": torch.ones(1, dtype=torch.complex128)})
