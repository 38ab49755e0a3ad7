"""Ranks and their groups: starting the process group, and the mesh of a layout.

Groups are cached by rank tuple: a process that builds hundreds of meshes (tests, `verify`, the
roles of reinforcement learning) keeps a flat number of threads and descriptors.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardwise.errors import ConfigError
from shardwise.parallel.layout import V_SHAPED, Layout

_GROUPS: dict[tuple[int, ...], dist.ProcessGroup] = {}
_TIMEOUT: timedelta | None = None


def pick_device(wish: str = "auto") -> torch.device:
    """The device of this rank: ``cuda:LOCAL_RANK`` where there is one, else the CPU."""
    if wish == "cpu" or (wish == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("engine.device=cuda, but torch sees no GPU; use engine.device=cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def backend_of(device_type: str) -> str:
    """How ranks talk whose tensors are there; those on the CPU always may, too."""
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def init_distributed(device: torch.device, timeout_s: float = 600.0) -> None:
    """Join the process group that torchrun's environment describes, or make one of a single rank.

    Every group made from now on has the same timeout. When a process group exists already, it
    stays as it is.
    """
    global _TIMEOUT
    _TIMEOUT = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    if dist.is_initialized():
        return
    backend = backend_of(device.type)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_TIMEOUT)


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, as CUDA's allocator does.

    It gives large buffers back to the system at once, and every step then pays for their pages
    again: up to a tenth of a 17M model's step (see `mallopt(3)`). Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_* of malloc.h
        mallopt(ctypes.c_int(trim_threshold), ctypes.c_int(-1))  # never
        mallopt(ctypes.c_int(mmap_max), ctypes.c_int(0))


def stop() -> None:
    """Leave the process group."""
    global _TIMEOUT
    _GROUPS.clear()
    _TIMEOUT = None
    if dist.is_initialized():
        dist.destroy_process_group()


def timeout() -> timedelta | None:
    """What `start` was given; None (torch's own) if another than it made the process group."""
    return _TIMEOUT


def group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The process group of ``ranks``; every rank of the world must ask in the same order."""
    if ranks not in _GROUPS:
        if len(ranks) == dist.get_world_size():
            assert dist.group.WORLD is not None
            _GROUPS[ranks] = dist.group.WORLD
        else:
            _GROUPS[ranks] = dist.new_group(list(ranks), timeout=_TIMEOUT)
    return _GROUPS[ranks]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The ranks of a layout as (pp, replicate, shard, cp, tp), and this rank's place among them.

    Context-parallel peers compute different tokens with the same weights, so to ZeRO they are data
    ranks: the shard axis of ``fsdp`` (and its all-reduce, for zero0) spans them too.
    """

    layout: Layout
    device: torch.device
    place: dict[str, int]  # coordinate by axis: pp, dp, cp, tp
    fsdp: DeviceMesh  # (replicate, shard) or (shard,): who sums gradients
    tp: DeviceMesh  # (tp,): who holds the parts of one weight
    # By name: dp, cp, tp, pp, peers, stage, shard, replicate, unique, ends, all.
    groups: dict[str, dist.ProcessGroup]

    @property
    def alone(self) -> bool:
        """Whether this rank's weights are nobody else's, so that ZeRO has nothing to do."""
        return self.fsdp.size() == 1

    @property
    def data_rank(self) -> int:
        """Which slice of the global batch this rank computes."""
        return self.place["dp"]

    @property
    def data_size(self) -> int:
        """Into how many slices the global batch is cut."""
        return self.layout.dp

    @property
    def last_stage(self) -> int:
        """The pipeline rank that computes the loss."""
        in_a_v = self.layout.schedule in V_SHAPED and self.layout.pp > 1
        return 0 if in_a_v else self.layout.pp - 1

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed on this rank."""
        return self.place["pp"] == self.last_stage

    @property
    def speaks(self) -> bool:
        """Whether this rank's sums count: one of those that compute the same loss."""
        return self.is_last_stage and self.place["cp"] == self.place["tp"] == 0


def build_mesh(layout: Layout, device: torch.device) -> Mesh:
    """Arrange all of the world's ranks; a collective call. Tensor-parallel peers are neighbours."""
    mesh = place_mesh(layout, device, range(layout.world))
    assert mesh is not None
    return mesh


def place_mesh(layout: Layout, device: torch.device, ranks: Sequence[int]) -> Mesh | None:
    """Arrange some ranks of the world (ascending); None on the others, which must call it too."""
    full = torch.tensor(list(ranks)).view(
        layout.pp, layout.replicate, layout.shard, layout.cp, layout.tp
    )
    rank = dist.get_rank()
    mine: dict[str, dist.ProcessGroup] = {}
    sharded = layout.zero > 0
    rows = {
        "tp": full.flatten(0, 3),
        "cp": full.movedim(3, -1).reshape(-1, layout.cp),
        "dp": full.permute(0, 3, 4, 1, 2).reshape(-1, layout.dp),
        "pp": full.movedim(0, -1).reshape(-1, layout.pp),
        # Those that share a slice of the batch.
        "peers": full.permute(1, 2, 0, 3, 4).reshape(layout.dp, -1),
        # Those that hold parts of the same layers.
        "stage": full.flatten(1),
        # Each weight of the model once: all but the replicas.
        "unique": full.movedim(1, 0).reshape(layout.replicate, -1),
        "all": full.reshape(1, -1),
    }
    data = full.permute(0, 4, 1, 2, 3)  # pp, tp, replicate, shard, cp
    if sharded:
        data = data.reshape(layout.pp, layout.tp, layout.replicate, -1)
    else:
        data = data.reshape(layout.pp, layout.tp, -1, 1)
        rows["unique"] = data.movedim(2, 0).reshape(data.shape[2], -1)
    if layout.pp > 1:  # who shares a tied embedding
        rows["ends"] = full[[0, -1]].flatten(1).T
    rows["replicate"] = data.movedim(2, -1).reshape(-1, data.shape[2])
    rows["shard"] = data.reshape(-1, data.shape[3])
    for axis, table in rows.items():
        for row in table.tolist():
            group = group_of(tuple(row))
            if rank in row:
                mine[axis] = group
    if rank not in ranks:
        return None
    where = (full == rank).nonzero()[0].tolist()
    place = {
        "pp": where[0],
        "dp": where[1] * layout.shard + where[2],
        "cp": where[3],
        "tp": where[4],
    }
    # DTensors need one mesh of all their axes, so weights know both how ZeRO and how tp cut them.
    grid = data[where[0]].permute(1, 2, 0)  # replicate, shard, tp
    groups, names = [mine["replicate"], mine["shard"], mine["tp"]], ["replicate", "shard", "tp"]
    if grid.shape[0] == 1:
        grid, groups, names = grid[0], groups[1:], names[1:]
    root = DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=tuple(names))
    fsdp = root[tuple(names[:-1])] if len(names) > 2 else root["shard"]
    return Mesh(layout, device, place, fsdp, root["tp"], mine)
