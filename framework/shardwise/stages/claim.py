"""A run's folder belongs to one run: taken by rank 0 or by the launcher, and every rank is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from shardwise.checkpoint.ranks import Ranks
from shardwise.storage.lock import LockedError, Presence, RunLock


@contextlib.contextmanager
def claimed(directory: Path, token: str = "") -> Iterator[None]:
    """Hold ``directory`` while the body runs; a collective call.

    ``token`` names the lock that the launcher of these ranks holds; without it rank 0 takes one.
    Raises LockedError, on all ranks alike and before anything is written, if another run has it.
    """
    rank = dist.get_rank()
    lock, refusal = None, None
    if rank == 0 and not token:
        try:
            lock = RunLock(directory)
            token = lock.token
        except LockedError as error:
            refusal = error
    if words := Ranks.of(None).share(str(refusal or "")):
        raise refusal or LockedError(words)
    presence = Presence(directory, token if rank == 0 else "")
    try:
        yield
    finally:
        presence.leave()
        if lock is not None:
            lock.release()
