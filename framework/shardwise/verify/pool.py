"""A persistent pool of rank processes, so that a multi-rank computation costs milliseconds.

Ranks are forked from a server process that has already imported torch. The caller hands the pool a
module-level function; every rank of the world calls it with the same arguments, and its return
values come back as a list by rank. An exception on any rank fails the call with that rank's
traceback, and the pool of that size is started afresh.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["shardwise.stages.ppo", "shardwise.stages.grpo", "shardwise.stages.sft"]
)


class _ByValue(ForkingPickler):
    """Tensors travel as numbers: torch's own way shares memory, at a descriptor for each."""

    _extra_reducers: ClassVar[dict[type, Any]] = {}


def _numbers(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _tensor, (flat, tensor.dtype, tuple(tensor.shape))


def _tensor(flat: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(flat).view(dtype).view(shape)


_ByValue.register(Tensor, _numbers)


def _send(pipe: Connection, value: Any) -> None:
    pipe.send_bytes(_ByValue.dumps(value))


class RankError(Exception):
    """A rank raised; ``cause`` is the type of its exception, the text its traceback."""

    def __init__(self, rank: int, cause: str, text: str) -> None:
        super().__init__(f"rank {rank} failed:\n{text}")
        self.rank, self.cause = rank, cause


def _rank_main(rank: int, world: int, store: str, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),  # type: ignore[attr-defined]
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
            answer = (True, fn(*args, **kwargs))
        except BaseException as error:
            answer = (False, (type(error).__name__, traceback.format_exc()))
        try:
            _send(pipe, answer)
        except BrokenPipeError:  # the caller has given up
            return


class _World:
    """``size`` rank processes with one gloo process group."""

    def __init__(self, size: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="shardwise-pool-")
        store = str(Path(self.folder.name) / "store")
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
            _send(pipe, (fn, args, kwargs))
        results: dict[int, Any] = {}
        waiting = {id(p): r for r, p in enumerate(self.pipes)}
        pending: list[Any] = list(self.pipes)
        while pending:
            ready = wait(pending, timeout)
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer")
            for pipe in ready:  # type: ignore[assignment]
                rank = waiting.pop(id(pipe))
                pending.remove(pipe)
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, ("ProcessDied", "the process died")
                if not ok:
                    raise RankError(rank, *value)
                results[rank] = value
        return [results[r] for r in range(len(self.pipes))]

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


class RankPool:
    """``pool.run(fn, *args, world=2)`` calls ``fn`` on every rank; returns values by rank.

    Raises RankError when a rank does, TimeoutError when one does not answer.
    """

    def __init__(self) -> None:
        self.worlds: dict[int, _World] = {}

    def run(
        self, fn: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 90, **kw: Any
    ) -> list[Any]:
        """See the class. ``timeout`` is in seconds, between answers."""
        if world not in self.worlds:
            self.worlds[world] = _World(world)
        try:
            return self.worlds[world].run(fn, args, kw, timeout)
        except BaseException:
            self.worlds.pop(world).stop()
            raise

    def close(self) -> None:
        """Stop all ranks."""
        for world in self.worlds.values():
            world.stop()
        self.worlds.clear()
