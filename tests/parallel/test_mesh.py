"""Process groups: every one has the timeout that the process was started with."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from shardwise.checkpoint import ranks as checkpoint_ranks
from shardwise.parallel import mesh
from tests.support.pool import RankPool


def timeouts() -> list[Any]:
    """Of the groups that a mesh and a checkpoint would make."""
    with (
        mock.patch.object(dist, "new_group", return_value=dist.group.WORLD) as made,
        mock.patch.dict(mesh._GROUPS, clear=True),
        mock.patch.dict(checkpoint_ranks._created, clear=True),
        mock.patch.object(mesh, "_TIMEOUT", None),
    ):
        mesh.init_distributed(torch.device("cpu"), timeout_s=77.0)
        mesh.group_of((0,))
        checkpoint_ranks.Ranks.of(None, background=True)
    return [call.kwargs["timeout"] for call in made.call_args_list]


def test_every_group_has_the_timeout(ranks: RankPool) -> None:
    assert ranks.run(timeouts, world=2) == [[timedelta(seconds=77)] * 2] * 2
