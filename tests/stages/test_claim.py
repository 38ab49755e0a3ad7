"""A run's folder is one run's; a scheduler's next attempt waits for the lock of the last one."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from shardwise.resilience.attempts import ATTEMPT
from shardwise.stages import claim
from shardwise.storage.lock import LockedError, RunLock
from tests.support.pool import RankPool


def waits(folder: str, attempt: str, held_s: float) -> float:
    """For how many seconds the folder could not be had; it is held for ``held_s``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim, "POLL_SECONDS", 0.02)
        patch.setattr(claim, "TAKEOVER_SECONDS", 20.0 if held_s < 10 else 0.2)
        patch.setenv(ATTEMPT, attempt) if attempt else patch.delenv(ATTEMPT, raising=False)
        lock = RunLock(Path(folder))
        timer = threading.Timer(held_s, lock.release)
        timer.start()
        began = time.monotonic()
        try:
            with claim.claimed(Path(folder)):
                return time.monotonic() - began
        finally:
            timer.cancel()
            lock.release()


def test_the_next_attempt_waits_for_what_a_lost_node_holds(ranks: RankPool, tmp_path: Path) -> None:
    [waited] = ranks.run(waits, str(tmp_path), "slurm.7.1", 0.3, world=1)
    assert waited > 0.2
    for attempt, held in (("", 0.3), ("slurm.7.1", 60.0)):
        with pytest.raises(Exception, match=f"another run lives.*|{LockedError.__name__}"):
            ranks.run(waits, str(tmp_path), attempt, held, world=1)
