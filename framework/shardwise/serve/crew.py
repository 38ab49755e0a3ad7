"""The ranks that share a server's engines: the first leads and listens, the others follow."""

from __future__ import annotations

import contextlib
import os
import signal

import torch.distributed as dist

from shardwise.errors import CheckFailed
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.mesh import Mesh
from shardwise.rollout import led
from shardwise.rollout.api import shared_mesh
from shardwise.rollout.engine import RolloutEngine


class Crew:
    """``tp`` ranks, the world; made by all of them, which then `add` the same engines."""

    def __init__(self, config: DecoderConfig, tp: int, device: str) -> None:
        mesh = shared_mesh(config, tp, device)
        assert mesh is not None, "one rank needs no crew"
        self.mesh: Mesh = mesh
        self._line = led.line()
        self._engines: dict[str, RolloutEngine] = {}
        self._lost = False

    def add(self, name: str, engine: RolloutEngine) -> RolloutEngine:
        """The engine as this rank calls it."""
        if dist.get_rank() == 0:
            engine = led.Leader(name, engine, self._line, self._lose)
        self._engines[name] = engine
        return engine

    def follow(self) -> None:
        """Of a rank that is not the first: do as it does, until it ends.

        What ends a server is sent to all ranks, and this one ends with the first.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        led.follow(self._engines, self._line)

    def end(self) -> None:
        """Of the first rank: the others return from `follow`. Raises CheckFailed if one is gone."""
        if self._lost:
            raise CheckFailed("a rank of the model failed, and the server has ended; see its log")
        with contextlib.suppress(RuntimeError):  # they are gone, and nobody is served any more
            led.end(self._line)

    def _lose(self) -> None:
        self._lost = True
        os.kill(os.getpid(), signal.SIGTERM)  # no request can be answered from now on
