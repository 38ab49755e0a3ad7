"""Counted collectives."""

from __future__ import annotations

import torch
import torch.distributed as dist

from shardwise.ops import comm
from tests.support.pool import RankPool


def _everything() -> dict[str, object]:
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    mine = torch.full((4,), float(rank + 1))
    found: dict[str, object] = {}
    with comm.tally() as tally:
        found["sum"] = comm.all_reduce(mine.clone(), group, "tp").tolist()
        found["max"] = comm.all_max(mine.clone(), group, "tp").tolist()
        out = torch.empty(4 * world)
        found["gathered"] = comm.all_gather(out, mine, group, "tp", async_op=True).wait().tolist()
        half = torch.empty(4 // world)
        found["scattered"] = comm.reduce_scatter(half, mine, group, "tp").wait().tolist()
        found["shifted"] = comm.ring_shift([mine], group, "cp").wait()[0].tolist()
        low = torch.full((3,), 1.0 + 2**-7, dtype=torch.bfloat16)
        found["bf16"] = comm.all_reduce(low, group, "tp").tolist()
    with comm.tally() as other:
        pass
    return found | {"rows": tally.rows(), "other": other.rows()}


def test_results_and_counts(ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(_everything, world=2)):
        assert found["sum"] == [3.0] * 4
        assert found["max"] == [2.0] * 4
        assert found["gathered"] == [1.0] * 4 + [2.0] * 4
        assert found["scattered"] == [3.0] * 2
        assert found["shifted"] == [2.0 - rank] * 4
        assert found["bf16"] == [2.0 + 2**-6] * 3
        assert found["other"] == []
        assert found["rows"] == [
            {"axis": "cp", "operation": "send", "calls": 1, "bytes": 16},
            {"axis": "tp", "operation": "all_gather", "calls": 1, "bytes": 32},
            {"axis": "tp", "operation": "all_reduce", "calls": 3, "bytes": 16 + 16 + 6},
            {"axis": "tp", "operation": "reduce_scatter", "calls": 1, "bytes": 16},
        ]
