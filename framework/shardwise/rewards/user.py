"""A user's own reward function, ``path.py:name``, run where it can do no harm.

The function is called as ``name(question: str, completion: str, answer: str, meta: dict)`` and
returns a number, or None for "cannot say". What it may do, and when:

- While its file is imported: read files in its own folder and where Python lives, import anything
  from there, compute. ``preload`` names modules to import that the file does not.
- While it scores: compute, in the memory and time of the recipe, with what was imported. No
  files, processes, threads or sockets, unless ``reads``, ``processes``, ``writes`` or ``network``
  say so. A call that is refused raises PermissionError there.

Nothing of the trainer is in reach: the sandbox (`worker.py`, `confine.py`, `seccomp.py`) is a fresh
program with an environment of its own and one socket. A function that raises, hangs, exhausts
memory or dies makes its own item *unscorable* (None), never 0, and never stops the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from shardwise.config.schema import PositiveInt, Seconds, Section, Weight
from shardwise.environment import clean_environment
from shardwise.errors import ConfigError
from shardwise.rewards.confine import SCRATCH
from shardwise.rewards.scored import Scored, scored, unscorable

log = logging.getLogger(__name__)
_MAX_ANSWER_BYTES = 1 << 16
_CONTROL_TIMEOUT_S = 10.0  # the loader only forks and waits; under load that takes its time
OVER = "timed out: the batch's time is over"
_RIGHTS = ("reads", "writes", "processes", "network")


class UserRewardConfig(Section):
    """A reward function of your own, and what it may do."""

    kind: Literal["user"] = "user"
    weight: Weight = Field(1.0, description="in the sum of the parts")
    function: str = Field(
        description="path.py:name, called in a sandbox", examples=["reward.py:score"]
    )
    timeout_s: Seconds = Field(5.0, description="seconds for one completion")
    batch_timeout_s: Seconds | None = Field(
        60.0,
        description="seconds for all completions of a call, the rest become unscorable; "
        "null: timeout_s for each that a worker gets, at least 60",
    )
    start_timeout_s: Seconds = Field(60.0, description="seconds to import the file")
    memory_mb: PositiveInt = Field(2048, description="address space of one worker, MiB")
    num_workers: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="processes of each rank"
    )
    preload: list[str] = Field(
        [], description="modules to import before the sandbox closes", examples=[["json"]]
    )
    reads: bool = Field(False, description="may read files and import modules while it scores")
    processes: bool = Field(False, description="may start processes")
    network: bool = Field(False, description="may open sockets")
    writes: bool = Field(False, description="may write, create or delete files")
    fresh_process: bool = Field(
        False,
        description="a process of its own for every completion (some 3 ms), for functions that "
        "run what a completion holds",
    )
    sandbox: Literal["required", "best_effort"] = Field(
        "required", description="best_effort: also run where this system cannot close the sandbox"
    )

    @field_validator("function")
    @classmethod
    def _path_and_name(cls, value: str) -> str:
        path, colon, name = value.rpartition(":")
        if not (colon and path.endswith(".py") and name.isidentifier()):
            raise ValueError(f"{value!r} is not of the form path.py:name")
        return value

    def seconds_for(self, num_items: int) -> float:
        """How long a call with so many completions may take."""
        if self.batch_timeout_s is not None:
            return self.batch_timeout_s
        return max(60.0, self.timeout_s * math.ceil(num_items / self.num_workers))


class _Sandbox:
    """The starter and the loader of one function; see `worker.py`."""

    def __init__(self, config: UserRewardConfig, until: float = math.inf) -> None:
        self.config = config
        path, _, name = config.function.rpartition(":")
        file = Path(path).resolve()
        settings = {
            "path": str(file),
            "name": name,
            "folders": [str(file.parent)],
            "memory_mb": config.memory_mb,
            "preload": config.preload,
            "allowed": {right: getattr(config, right) for right in _RIGHTS},
            "processes": config.processes,
            "required": config.sandbox == "required",
        }
        # A clean environment: secrets stay with the trainer, and hashing is reproducible.
        environment = clean_environment(
            PATH=os.defpath,
            HOME=SCRATCH,
            MPLCONFIGDIR=SCRATCH,
            LANG="C.UTF-8",
            PYTHONHASHSEED="0",
            OMP_NUM_THREADS="1",
            OPENBLAS_NUM_THREADS="1",
        )
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -P: the folder of worker.py must not shadow modules of the user.
        command = [sys.executable, "-s", "-P", "-B", str(Path(__file__).with_name("worker.py"))]
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
        self.lacking = self._wait_ready(until)

    def _wait_ready(self, until: float) -> dict[str, str]:
        deadline = min(time.monotonic() + self.config.start_timeout_s, until)
        try:
            self.control.settimeout(max(deadline - time.monotonic(), 1e-3))
            reply = json.loads(_receive(self.control)[0])
        except (OSError, EOFError, ValueError) as e:
            reply = {"error": f"it did not start ({type(e).__name__}: {e})"}
        if "ready" in reply:
            return dict(reply["lacking"])
        self.kill()
        if "error" in reply:
            raise ConfigError(
                f"reward function {self.config.function!r} cannot be loaded: {reply['error']}"
            )
        why = "; ".join(f"{name}: {text}" for name, text in reply["lacking"].items())
        raise ConfigError(
            f"reward function {self.config.function!r}: this system cannot close the sandbox "
            f"({why}). It needs Linux on x86_64 or aarch64 with seccomp filters; to run code that "
            "you trust without, set sandbox=best_effort for this reward"
        )

    def ask(self, message: bytes, *sockets: socket.socket) -> dict[str, Any]:
        """One request to the loader; OSError or EOFError when it does not answer."""
        self.control.settimeout(_CONTROL_TIMEOUT_S)
        socket.send_fds(self.control, [message], [s.fileno() for s in sockets])
        found: dict[str, Any] = json.loads(_receive(self.control)[0])
        return found

    def kill(self) -> None:
        """End it with all its processes."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.control.close()


class _Worker:
    """One scorer and the socket to it."""

    def __init__(self, sandbox: _Sandbox) -> None:
        self.sandbox, self.config = sandbox, sandbox.config
        self.socket, theirs = socket.socketpair()
        if hasattr(socket, "SO_PASSCRED"):  # the kernel says which process a message comes from
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.buffer = b""
        self.item: int | None = None  # which item it is working on
        self.token = ""
        self.deadline = 0.0
        self.pid, self.handle = 0, -1
        try:
            with theirs:
                self.inner_pid = int(sandbox.ask(b"fork", theirs)["pid"])
            self.socket.settimeout(_CONTROL_TIMEOUT_S)
            hello, self.pid = _receive(self.socket)
            self.pid = self.pid or self.inner_pid  # where the system does not tell
            self.handle = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else -1
            if "ready" not in (reply := json.loads(hello)):
                raise OSError(reply["error"])
        except BaseException:
            self.socket.close()
            raise

    def send(self, index: int, item: Mapping[str, Any], until: float) -> None:
        """Hand over an item; raises OSError when the worker does not take it in time."""
        self.item, self.token = index, secrets.token_hex(8)
        self.deadline = min(time.monotonic() + self.config.timeout_s, until)
        self.socket.settimeout(max(self.deadline - time.monotonic(), 1e-3))
        self.socket.sendall(json.dumps({**item, "token": self.token}).encode() + b"\n")

    def has_spoken(self) -> bool:
        """Whether it said something that it was not asked, or has died."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def receive(self) -> dict[str, Any] | None:
        """The answer, or None when there is only a part of one yet; EOFError when it died."""
        data = self.socket.recv(65536)
        if not data:
            raise EOFError("the process died")
        self.buffer += data
        if len(self.buffer) > _MAX_ANSWER_BYTES:
            raise OSError("it answered too much")
        line, newline, self.buffer = self.buffer.partition(b"\n")
        if not newline:
            self.buffer = line
            return None
        reply = json.loads(line)
        value, asked = reply["value"], reply["token"] == self.token and not self.buffer
        if not asked or not (value is None or isinstance(value, float)):
            raise ValueError("an answer that was not asked for")
        return dict(reply)

    def kill(self) -> str:
        """Kill it and all its children; returns how it had ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.config.processes:
                os.killpg(self.pid, signal.SIGKILL)
            elif self.handle >= 0:
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)
        if self.handle >= 0:
            os.close(self.handle)
        self.socket.close()
        return str(self.sandbox.ask(f"reap {self.inner_pid}".encode())["ended"])


def _receive(end: socket.socket) -> tuple[bytes, int]:
    """A message and the pid of its sender (0: unknown); EOFError at the end."""
    data, notes, _, _ = end.recvmsg(1 << 16, socket.CMSG_SPACE(12))
    if not data:
        raise EOFError("the process died")
    for level, kind, note in notes:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return data, int(struct.unpack("3i", note[:12])[0])
    return data, 0


class UserReward:
    """A pool of workers for one function. Use as a context manager, or call `close`."""

    def __init__(self, config: UserRewardConfig) -> None:
        path, _, name = config.function.rpartition(":")
        if not Path(path).is_file():
            raise ConfigError(f"reward function {config.function!r}: there is no file {path}")
        self.config = config
        self.name = name
        self.num_replaced = 0  # workers killed so far, because of a hostile or broken item
        self.sandbox = _Sandbox(config)
        self.workers: list[_Worker | None] = [None] * config.num_workers
        if self.sandbox.lacking:
            log.warning(
                "the sandbox of reward %s does without %s",
                name,
                "; ".join(f"{k} ({why})" for k, why in self.sandbox.lacking.items()),
            )

    def score(self, items: Sequence[Mapping[str, Any]]) -> list[Scored]:
        """Score items with keys question, completion, answer, meta (JSON); one result an item."""
        results: list[Scored | None] = [None] * len(items)
        todo = deque(range(len(items)))
        until = time.monotonic() + self.config.seconds_for(len(items))
        with selectors.DefaultSelector() as selector:
            batch = _Batch(self, items, results, todo, selector, until)
            for slot in range(len(self.workers)):
                batch.next(slot)
            while busy := [w for w in self.workers if w is not None and w.item is not None]:
                first = min(w.deadline for w in busy)
                ready = selector.select(max(first - time.monotonic(), 0))
                for key, _ in ready:
                    batch.collect(key.data)
                now = time.monotonic()
                for slot, worker in enumerate(self.workers):
                    if worker is not None and worker.item is not None and worker.deadline <= now:
                        batch.fail(slot, "timed out")
                        batch.next(slot)
        over = time.monotonic() >= until
        left = Scored(None, OVER if over else "no worker could be started")
        return [r if r is not None else left for r in results]

    def start(self, slot: int, until: float) -> _Worker | None:
        """A worker for a slot, or none until the next batch: load on a machine stops no run."""
        for attempt in range(2):
            if time.monotonic() >= until:
                return None
            try:
                if attempt:
                    self.sandbox.kill()
                    self.sandbox = _Sandbox(self.config, until)
                self.workers[slot] = _Worker(self.sandbox)
                return self.workers[slot]
            except (ConfigError, OSError, EOFError, ValueError, KeyError) as e:
                log.info("reward %s: a worker could not be started: %s", self.name, e)
        return None

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            if worker is not None:
                with contextlib.suppress(OSError, EOFError, ValueError, KeyError):
                    worker.kill()
        self.workers = []
        self.sandbox.kill()

    def __enter__(self) -> UserReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Batch:
    """One call of `UserReward.score` under way."""

    def __init__(
        self,
        reward: UserReward,
        items: Sequence[Mapping[str, Any]],
        results: list[Scored | None],
        todo: deque[int],
        selector: selectors.BaseSelector,
        until: float,
    ) -> None:
        self.reward, self.items, self.results, self.todo = reward, items, results, todo
        self.selector, self.until = selector, until

    def next(self, slot: int) -> None:
        """Give the worker of a slot its next item, if any is left and there is time."""
        workers = self.reward.workers
        while self.todo and ((worker := workers[slot]) is None or worker.item is None):
            if time.monotonic() >= self.until:
                return
            if worker is not None and worker.has_spoken():
                self.end(slot)
                worker = None
            worker = worker or self.reward.start(slot, self.until)
            if worker is None:
                return
            index = self.todo.popleft()
            if worker.socket not in {k.fileobj for k in self.selector.get_map().values()}:
                self.selector.register(worker.socket, selectors.EVENT_READ, slot)
            try:
                worker.send(index, self.items[index], self.until)
            except OSError as e:
                self.fail(slot, f"crashed: {e}")

    def collect(self, slot: int) -> None:
        """Take what a worker has sent."""
        worker = self.reward.workers[slot]
        if worker is None or worker.item is None:
            return  # it will be noticed before its next item
        try:
            reply = worker.receive()
            if reply is None:
                return
            value, said = reply["value"], "the reward function returned"
            found = unscorable(str(reply["reason"])) if value is None else scored(value, said)
            self.results[worker.item], worker.item = found, None
            if self.reward.config.fresh_process:
                self.end(slot)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
            self.fail(slot, f"crashed: {e}")
        self.next(slot)

    def fail(self, slot: int, reason: str) -> None:
        """The worker of this slot is lost, with its item; another takes its place when needed."""
        worker = self.reward.workers[slot]
        assert worker is not None and worker.item is not None
        ended = self.end(slot)
        detail = f" ({ended})" if ended and reason.startswith("crashed") else ""
        self.results[worker.item] = unscorable(reason + detail)
        self.reward.num_replaced += 1

    def end(self, slot: int) -> str:
        """End the worker of a slot; how it had ended, if that can be known."""
        worker = self.reward.workers[slot]
        assert worker is not None
        if worker.socket in {k.fileobj for k in self.selector.get_map().values()}:
            self.selector.unregister(worker.socket)
        self.reward.workers[slot] = None
        try:
            return worker.kill()
        except (OSError, EOFError, ValueError, KeyError):
            self.reward.sandbox.kill()  # the next start makes another
            return ""
