"""A session-wide pool of rank processes, so that a multi-rank test costs milliseconds.

Ranks are forked from a server process that has already imported torch. A test hands the pool a
module-level function; every rank of the world calls it with the same arguments and its return
values come back as a list by rank. An exception on any rank fails the test with that rank's
traceback, and the pool of that size is started afresh.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor"])


def _rank_main(rank: int, world: int, store: str, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        fn, args, kwargs = task
        try:
            pipe.send((True, fn(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class _World:
    """``size`` rank processes with one gloo process group."""

    def __init__(self, size: int) -> None:
        store = tempfile.mktemp(prefix="shardwise-pool-")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_rank_main, args=(rank, size, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, fn: Callable[..., Any], args: Any, kwargs: Any, timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((fn, args, kwargs))
        results: dict[int, Any] = {}
        waiting = {id(p): r for r, p in enumerate(self.pipes)}
        pending = list(self.pipes)
        while pending:
            ready = wait(pending, timeout)
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer")
            for pipe in ready:
                rank = waiting.pop(id(pipe))
                pending.remove(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[r] for r in range(len(self.pipes))]

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()


class RankPool:
    """``pool.run(fn, *args, world=2)`` calls ``fn`` on every rank; returns values by rank."""

    def __init__(self) -> None:
        self.worlds: dict[int, _World] = {}

    def run(
        self, fn: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 90, **kw: Any
    ) -> list[Any]:
        if world not in self.worlds:
            self.worlds[world] = _World(world)
        try:
            return self.worlds[world].run(fn, args, kw, timeout)
        except BaseException:
            self.worlds.pop(world).stop()
            raise

    def close(self) -> None:
        for world in self.worlds.values():
            world.stop()
        self.worlds.clear()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
