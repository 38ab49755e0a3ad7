"""A user's own reward function, ``path.py:name``, run where it can do no harm.

Each worker is a separate process behind memory, CPU, process, network, signal and file-writing
limits (`worker.py`, `seccomp.py`), spoken to in JSON lines over a socket, one item at a time. A
function that raises, hangs, exhausts memory or dies makes its own item *unscorable* (None), never
0, and never stops the run: the worker is killed with all its children and replaced.

The function is called as ``name(question: str, completion: str, answer: str, meta: dict)`` and
returns a float, or None for "cannot say".
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from shardwise.config.schema import PositiveFloat, PositiveInt, Section
from shardwise.errors import ConfigError
from shardwise.rewards.scored import Scored, scored, unscorable

log = logging.getLogger(__name__)
_MAX_ANSWER_BYTES = 1 << 16
OVER = "timed out: the batch's time is over"
_LIMITS_WANTED = {"memory", "cpu", "processes", "network", "writes"}


class UserRewardConfig(Section):
    """A reward function of your own, and what it may do."""

    kind: Literal["user"] = "user"
    weight: float = 1.0
    function: str = Field(description="path.py:name, called in a sandbox")
    timeout_s: PositiveFloat = Field(5.0, description="seconds for one completion")
    batch_timeout_s: PositiveFloat = Field(
        60.0, description="seconds for all completions of a call; the rest become unscorable"
    )
    start_timeout_s: PositiveFloat = Field(60.0, description="seconds to import the file")
    memory_mb: PositiveInt = Field(2048, description="address space of one worker, MiB")
    num_workers: PositiveInt = 1
    processes: bool = Field(False, description="may start processes")
    network: bool = Field(False, description="may open sockets")
    writes: bool = Field(False, description="may write, create or delete files")

    @field_validator("function")
    @classmethod
    def _path_and_name(cls, value: str) -> str:
        path, colon, name = value.rpartition(":")
        if not (colon and path.endswith(".py") and name.isidentifier()):
            raise ValueError(f"{value!r} is not of the form path.py:name")
        return value


class _Worker:
    """One sandboxed process and the socket to it."""

    def __init__(self, config: UserRewardConfig, until: float = math.inf) -> None:
        self.config = config
        path, _, name = config.function.rpartition(":")
        settings = config.model_dump(exclude={"function", "kind"}) | {
            "path": str(Path(path).resolve()),
            "name": name,
        }
        ours, theirs = socket.socketpair()
        # A clean environment: secrets stay with the trainer, and hashing is reproducible.
        environment = {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        # -P: the folder of worker.py must not shadow modules of the user.
        command = [sys.executable, "-s", "-P", str(Path(__file__).with_name("worker.py"))]
        self.process = subprocess.Popen(
            [*command, str(theirs.fileno()), json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self.socket = ours
        self.buffer = b""
        self.item: int | None = None  # which item it is working on
        self.deadline = 0.0
        self.limits = self._wait_ready(until)

    def _wait_ready(self, until: float) -> set[str]:
        self.deadline = min(time.monotonic() + self.config.start_timeout_s, until)
        try:
            line = None
            while line is None:
                self.socket.settimeout(max(self.deadline - time.monotonic(), 1e-3))
                line = self.receive()
            reply = json.loads(line)
        except (OSError, EOFError, ValueError) as e:
            self.kill()
            reply = {"error": f"it did not start ({type(e).__name__}: {e})"}
        if "error" in reply:
            self.kill()
            raise ConfigError(
                f"reward function {self.config.function!r} cannot be loaded: {reply['error']}"
            )
        return set(reply["ready"])

    def send(self, index: int, item: Mapping[str, Any], until: float) -> None:
        """Hand over an item; raises OSError when the worker does not take it in time."""
        self.item = index
        self.deadline = min(time.monotonic() + self.config.timeout_s, until)
        self.socket.settimeout(max(self.deadline - time.monotonic(), 1e-3))
        self.socket.sendall(json.dumps(item).encode() + b"\n")

    def receive(self) -> bytes | None:
        """A whole line, or None when there is only a part of one yet; EOFError when it died."""
        data = self.socket.recv(65536)
        if not data:
            raise EOFError("the process died")
        self.buffer += data
        if len(self.buffer) > _MAX_ANSWER_BYTES:
            raise OSError("it answered too much")
        line, newline, rest = self.buffer.partition(b"\n")
        if not newline:
            return None
        self.buffer = rest
        return line

    def kill(self) -> str:
        """Kill it and all its children; returns how it had ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.socket.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class UserReward:
    """A pool of workers for one function. Use as a context manager, or call `close`."""

    def __init__(self, config: UserRewardConfig) -> None:
        path, _, name = config.function.rpartition(":")
        if not Path(path).is_file():
            raise ConfigError(f"reward function {config.function!r}: there is no file {path}")
        self.config = config
        self.name = name
        self.num_replaced = 0  # workers killed so far, because of a hostile or broken item
        first = _Worker(config)
        self.workers: list[_Worker | None] = [first]
        self.workers += [_Worker(config) for _ in range(config.num_workers - 1)]
        allowed = {k for k in ("processes", "network", "writes") if getattr(config, k)}
        missing = _LIMITS_WANTED - first.limits - allowed
        if missing:
            log.warning(
                "the reward sandbox cannot limit %s on this system: run only code you trust",
                ", ".join(sorted(missing)),
            )

    def score(self, items: Sequence[Mapping[str, Any]]) -> list[Scored]:
        """Score items with keys question, completion, answer, meta (JSON); one result an item."""
        results: list[Scored | None] = [None] * len(items)
        todo = deque(range(len(items)))
        until = time.monotonic() + self.config.batch_timeout_s
        with selectors.DefaultSelector() as selector:
            for slot, worker in enumerate(self.workers):
                if worker is None:
                    self._start(slot, until)
                self._next(slot, todo, items, results, selector, until)
            while busy := [w for w in self.workers if w is not None and w.item is not None]:
                first = min(w.deadline for w in busy)
                ready = selector.select(max(first - time.monotonic(), 0))
                for key, _ in ready:
                    self._collect(key.data, todo, items, results, selector, until)
                now = time.monotonic()
                for slot, worker in enumerate(self.workers):
                    if worker is not None and worker.item is not None and worker.deadline <= now:
                        self._fail(slot, "timed out", results, selector, until)
                        self._next(slot, todo, items, results, selector, until)
        over = time.monotonic() >= until
        left = Scored(None, OVER if over else "no worker could be started")
        return [r if r is not None else left for r in results]

    def _next(
        self,
        slot: int,
        todo: deque[int],
        items: Sequence[Mapping[str, Any]],
        results: list[Scored | None],
        selector: selectors.BaseSelector,
        until: float,
    ) -> None:
        """Give the worker of a slot its next item, if any is left and there is time."""
        while todo and (worker := self.workers[slot]) is not None and worker.item is None:
            if time.monotonic() >= until:
                return
            index = todo.popleft()
            if worker.socket not in {k.fileobj for k in selector.get_map().values()}:
                selector.register(worker.socket, selectors.EVENT_READ, slot)
            try:
                worker.send(index, items[index], until)
            except OSError as e:
                self._fail(slot, f"crashed: {e}", results, selector, until)

    def _collect(
        self,
        slot: int,
        todo: deque[int],
        items: Sequence[Mapping[str, Any]],
        results: list[Scored | None],
        selector: selectors.BaseSelector,
        until: float,
    ) -> None:
        worker = self.workers[slot]
        assert worker is not None
        try:
            line = worker.receive()
            if line is None:
                return
            reply = json.loads(line)
            value, reason = reply["value"], str(reply["reason"])
            if worker.item is None or not (value is None or isinstance(value, float)):
                raise ValueError("an answer that was not asked for")
            said = "the reward function returned"
            results[worker.item] = unscorable(reason) if value is None else scored(value, said)
            worker.item = None
        except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
            self._fail(slot, f"crashed: {e}", results, selector, until)
        self._next(slot, todo, items, results, selector, until)

    def _fail(
        self,
        slot: int,
        reason: str,
        results: list[Scored | None],
        selector: selectors.BaseSelector,
        until: float,
    ) -> None:
        """The worker of this slot is lost, with its item; put a new one in its place."""
        worker = self.workers[slot]
        assert worker is not None
        selector.unregister(worker.socket)
        ended = worker.kill()
        if worker.item is not None:
            detail = f" ({ended})" if reason.startswith("crashed") else ""
            results[worker.item] = unscorable(reason + detail)
        self.num_replaced += 1
        log.warning("reward %s %s on one completion; worker replaced", self.name, reason)
        self._start(slot, until)

    def _start(self, slot: int, until: float) -> None:
        """A new worker, or none until the next batch: a machine under load stops no training."""
        self.workers[slot] = None
        if time.monotonic() >= until:
            return
        try:
            self.workers[slot] = _Worker(self.config, until)
        except (ConfigError, OSError) as e:
            log.warning("reward %s: a worker could not be started again: %s", self.name, e)

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            if worker is not None:
                worker.kill()
        self.workers = []

    def __enter__(self) -> UserReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
