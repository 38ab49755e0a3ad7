"""The process from which ranks are forked: everything imported once, its memory shared by all.

Without torch, so that a command starts the server first and imports beside it.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing as mp
import os
from collections.abc import Iterator
from multiprocessing import forkserver

CONTEXT = mp.get_context("forkserver")
# `__main__` too: else every rank would run a script once more.
CONTEXT.set_forkserver_preload(
    [
        "shardwise.verify.first_import",
        "shardwise.verify.run",
        "shardwise.verify.rank",
        "shardwise.stages.pretrain",
        "shardwise.stages.ppo",
        "shardwise.stages.grpo",
        "shardwise.stages.sft",
        "numpy.ma",  # these two are imported by a first step
        "torch.profiler._cupti_monitor",
        "__main__",
    ]
)
# A process with a pool of threads cannot be forked safely, and 64 ranks have no use for 64 pools.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


def start() -> None:
    """Start the server unless it runs; returns at once, while it imports."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Start the server, and import beside it what stands inside (see `first_import`)."""
    start()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
