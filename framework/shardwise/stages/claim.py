"""A run's folder belongs to one run: taken by rank 0 or by the launcher, and every rank is told."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from shardwise.checkpoint.ranks import Ranks
from shardwise.resilience.attempts import ATTEMPT
from shardwise.storage.lock import LockedError, Presence, RunLock

# A file server may keep the locks of a host that is gone; NFS gives them a lease of 90 s.
TAKEOVER_SECONDS, POLL_SECONDS = 120.0, 2.0


@contextlib.contextmanager
def claimed(directory: Path, token: str = "") -> Iterator[None]:
    """Hold ``directory`` while the body runs; a collective call.

    ``token`` names the lock that the launcher of these ranks holds; without it rank 0 takes one.
    Raises LockedError, on all ranks alike and before anything is written, if another run has it. A
    scheduler's new attempt waits `TAKEOVER_SECONDS` for what the old one left on a lost node.
    """
    rank = dist.get_rank()
    lock, refusal = None, None
    if rank == 0 and not token:
        until = time.monotonic() + (TAKEOVER_SECONDS if ATTEMPT in os.environ else 0.0)
        try:
            lock = _take(directory, until)
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


def _take(directory: Path, until: float) -> RunLock:
    while True:
        try:
            return RunLock(directory)
        except LockedError:
            if time.monotonic() > until:
                raise
            time.sleep(POLL_SECONDS)
