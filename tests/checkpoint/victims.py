"""What the processes of test_kills.py run until they die; imports little, so they start fast."""

from __future__ import annotations

from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from shardwise import checkpoint
from shardwise.checkpoint import saving
from shardwise.errors import CheckpointError
from tests.checkpoint.tools import FILES, content, kill_myself, patched, save


def victim(root: Path, phase: str, number: int, after: bool, asynchronous: bool) -> None:
    saving.MAX_SHARD_BYTES = 3000  # two files
    writer = patched(phase, kill_myself, number=number, after=after)
    if asynchronous:
        with checkpoint.AsyncSaver(root, writer=writer, keep=1) as saver:
            saver.save(3, content(3), {"step": 3}, FILES, metric=0.0)
    else:
        save(root, 3, writer=writer, keep=1, metric=0.0)


def endless(root: Path, pipe: Connection, asynchronous: bool) -> None:
    saver = checkpoint.AsyncSaver(root, keep=2)
    for step in range(1, 1_000_000):
        if asynchronous:
            saver.save(step, content(step), {"step": step}, FILES)
            pipe.send(step - 1)  # the one before is durable, or `save` would have waited
        else:
            save(root, step, keep=2)
            pipe.send(step)


def ranked(
    rank: int, store: str, root: Path, phase: str, dies: int, asynchronous: bool, pipe: Connection
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    writer = patched(phase, kill_myself) if rank == dies else None
    try:
        if asynchronous:
            with checkpoint.AsyncSaver(root, writer=writer) as saver:
                saver.save(3, content(3), {"step": 3}, FILES)
        else:
            save(root, 3, writer=writer)
    except CheckpointError as error:
        pipe.send(str(error))
