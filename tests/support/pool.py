"""The rank pool of `shardwise.verify`, which the tests use too."""

from __future__ import annotations

import socket

from shardwise.verify.pool import CONTEXT, RankError, RankHang, RankPool

__all__ = ["CONTEXT", "RankError", "RankHang", "RankPool", "free_port"]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
