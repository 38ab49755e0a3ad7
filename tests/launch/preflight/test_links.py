"""Who is measured with whom, and that it is."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from shardwise.launch.preflight import links
from shardwise.launch.preflight.board import Board, Place
from tests.support.pool import RankPool


@given(st.integers(2, 40))
def test_rounds_are_fair(count: int) -> None:
    nodes = list(range(10, 10 + count))
    plan = list(links.rounds(nodes))
    for pairs in plan:
        flat = [node for pair in pairs for node in pair]
        assert len(flat) == len(set(flat)) >= count - 1 - count % 2
    met = [pair for pairs in plan for pair in pairs]
    assert len(met) == len(set(met))
    if count <= 8:
        assert len(met) == count * (count - 1) // 2
    else:
        partners = [sum(node in pair for pair in met) for node in nodes]
        assert len(plan) == links.MAX_PARTNERS and min(partners) >= links.MAX_PARTNERS - 1


def measure(nodes: dict[str, list[int]], key: str) -> list[dict[str, Any]]:
    rank = dist.get_rank()
    node, local = next((int(n), r.index(rank)) for n, r in nodes.items() if rank in r)
    place = Place(rank, dist.get_world_size(), node, local, len(nodes[str(node)]), f"n{node}")
    board = Board(PrefixStore(key, _get_default_store()), place, {})
    return links.measure(place, board, 60.0, nodes, "cpu")


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ({"0": [0, 1], "1": [2, 3]}, [([0], 0), ([0, 1], 0), ([0, 1], 1), ([1], 0)]),
        ({"0": [0, 1, 2], "1": [3]}, [([0], 0), ([0, 1], 0)]),  # a rail needs both ends
    ],
)
def test_every_link_is_told_once(
    ranks: RankPool, nodes: dict[str, list[int]], expected: list[Any]
) -> None:
    found = [k for told in ranks.run(measure, nodes, uuid.uuid4().hex, world=4) for k in told]
    assert sorted((k["nodes"], k["rail"]) for k in found) == expected
    assert all(k["gb_s"] > 0 and not k["error"] for k in found)
