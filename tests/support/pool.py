"""The rank pool of `shardwise.verify`, which the tests use too."""

from __future__ import annotations

import multiprocessing as mp
import socket

from shardwise.verify.pool import RankError, RankHang, RankPool

__all__ = ["CONTEXT", "RankError", "RankHang", "RankPool", "free_port"]

# For single processes that a test kills.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["shardwise.stages.pretrain"])


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
