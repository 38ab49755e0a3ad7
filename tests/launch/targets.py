"""What the ranks of a test launch do."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from shardwise.errors import DataError


def meet() -> int:
    """Sum of 2**rank over the world, through gloo."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    value = torch.tensor([2 ** dist.get_rank()])
    dist.all_reduce(value)
    return int(value)


def write_sum(folder: str) -> None:
    rank = int(os.environ["RANK"])
    print(f"hello from {rank}")
    result = {"sum": meet(), "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


def fail(folder: str, rank: int, how: str) -> None:
    """All ranks meet, one fails in the given way, the others wait for it in a collective."""
    import torch.distributed as dist

    meet()
    me = int(os.environ["RANK"])
    Path(folder, f"{me}.pid").write_text(str(os.getpid()))
    dist.barrier()
    if me != rank:
        dist.barrier()
        return
    if how == "raise":
        raise RuntimeError("the cat ate it")
    if how == "secret":
        raise RuntimeError("cannot reach https://me:very-secret-value@example.org")
    if how == "user error":
        raise DataError("books.jsonl:7: not JSON; mend the line")
    if how == "_exit":
        os._exit(7)
    if how == "done early":
        os._exit(0)
    if how == "sys.exit":
        sys.exit(9)
    os.kill(os.getpid(), getattr(signal, how))


def linger(folder: str) -> None:
    """Say that we are there, then wait for a signal."""
    meet()
    rank = int(os.environ["RANK"])
    Path(folder, f"{rank}.pid").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)
