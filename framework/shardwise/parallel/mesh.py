"""Ranks and their groups: starting the process group, and the mesh of a layout.

Groups are cached by rank tuple: a process that builds hundreds of meshes (tests, `verify`, the
roles of reinforcement learning) keeps a flat number of threads and descriptors.
"""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardwise.errors import ConfigError
from shardwise.parallel.layout import Layout

_GROUPS: dict[tuple[int, ...], dist.ProcessGroup] = {}


def pick_device(wish: str = "auto") -> torch.device:
    """The device of this rank: ``cuda:LOCAL_RANK`` where there is one, else the CPU."""
    if wish == "cpu" or (wish == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("engine.device=cuda, but torch sees no GPU; use engine.device=cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start(device: torch.device, timeout_s: float = 600.0) -> None:
    """Join the process group that torchrun's environment describes, or make one of a single rank.

    Does nothing when a process group exists already.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def stop() -> None:
    """Leave the process group."""
    _GROUPS.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The process group of ``ranks``; every rank of the world must ask in the same order."""
    if ranks not in _GROUPS:
        if len(ranks) == dist.get_world_size():
            assert dist.group.WORLD is not None
            _GROUPS[ranks] = dist.group.WORLD
        else:
            _GROUPS[ranks] = dist.new_group(list(ranks))
    return _GROUPS[ranks]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The device mesh of a layout, with axes (replicate, shard), and this rank's place in it."""

    layout: Layout
    device: torch.device
    fsdp: DeviceMesh  # 2-D (replicate, shard) or 1-D (shard)
    data_group: dist.ProcessGroup
    shard_group: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        """Which slice of the global batch this rank computes."""
        return self.data_group.rank()

    @property
    def data_size(self) -> int:
        """Into how many slices the global batch is cut."""
        return self.data_group.size()


def build_mesh(layout: Layout, device: torch.device) -> Mesh:
    """Arrange the world's ranks as (replicate, shard); a collective call."""
    grid = torch.arange(layout.world).view(layout.replicate, layout.shard)
    rank = dist.get_rank()
    mine: dict[str, dist.ProcessGroup] = {}
    for axis, rows in (("shard", grid), ("replicate", grid.T)):
        for row in rows.tolist():
            group = group_of(tuple(row))
            if rank in row:
                mine[axis] = group
    if layout.replicate == 1:
        fsdp = DeviceMesh.from_group(mine["shard"], device.type, mesh_dim_names=("shard",))
    else:
        fsdp = DeviceMesh.from_group(
            [mine["replicate"], mine["shard"]],
            device.type,
            mesh=grid,
            mesh_dim_names=("replicate", "shard"),
        )
    data_group = group_of(tuple(range(layout.world)))
    return Mesh(layout, device, fsdp, data_group, mine["shard"])
