"""The process from which ranks are forked: everything imported once, its memory shared by all.

Without torch here, so that a command starts the server first and imports beside it. It is not
multiprocessing's: that one runs the caller's script again in every process, so a script without
``if __name__ == "__main__"`` could not verify anything.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

PRELOADED = (
    "shardwise.verify.run",
    "shardwise.verify.rank",
    "shardwise.stages.pretrain",
    "shardwise.stages.ppo",
    "shardwise.stages.grpo",
    "shardwise.stages.sft",
    "shardwise.engines.native",
    "shardwise.engines.plain",
    "numpy.ctypeslib",  # these three are imported by a first step
    "numpy.ma",
    "torch.profiler._cupti_monitor",
)
# A process with a pool of threads cannot be forked safely, and 64 ranks have no use for 64 pools.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from shardwise.verify.server import serve; serve(int(sys.argv[1]))"
)
_DYING_S = 1.0


class Server:
    """This process's end: asks for ranks, and how they ended."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self.owner = os.getpid()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT,
            )

    def fork(self, rank: int, world: int, folder: str, backend: str, pipe: Connection) -> int:
        """Start a rank that answers on ``pipe``; its process id."""
        return int(self._ask({"fork": [rank, world, folder, backend]}, [pipe.fileno()]))

    def ended(self, pid: int) -> int | None:
        """How a rank ended: its exit code, or minus the signal; None if it is still there."""
        code = self._ask({"ended": pid})
        return None if code is None else int(code)

    def _ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> Any:
        with self._lock:
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], list(fds))
                answer = self._socket.recv(1 << 16)
            except OSError:
                answer = b""
        if not answer:
            code = self.process.wait()
            raise RuntimeError(f"the process that ranks are forked from ended (exit code {code})")
        return json.loads(answer)


_server: Server | None = None


def start() -> Server:
    """The server, started unless it runs; returns at once, while it imports."""
    global _server
    if _server is None or _server.owner != os.getpid() or _server.process.poll() is not None:
        _server = Server()
    return _server


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Start the server, and import beside it what stands inside.

    Collecting garbage while modules are made would cost a seventh of the time, and find none. Nor
    would looking through all of them later, which takes two tenths of a second at a time.
    """
    start()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # what extension modules hold is counted as they are ended
    finally:
        if collects:
            gc.enable()


def serve(fd: int) -> NoReturn:
    """What the server does: import, then fork ranks until the asking process is gone; ends it."""
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked ends us
    for name in PRELOADED:
        importlib.import_module(name)
    from shardwise.config.registry import discover

    discover()  # what other packages register: a rank is handed configs, and reads no recipe
    asking = socket.socket(fileno=fd)
    while True:
        data, fds, *_ = socket.recv_fds(asking, 1 << 16, 1)
        if not data:
            os._exit(0)  # taking a thousand modules apart takes a second
        request = json.loads(data)
        if "fork" in request:
            answer: int | None = os.fork()
            if answer == 0:
                asking.close()
                _be_a_rank(request["fork"], Connection(fds[0]))
            os.close(fds[0])
        else:
            answer = _ended(request["ended"])
        asking.sendall(json.dumps(answer).encode())


def _be_a_rank(who: tuple[int, int, str, str], pipe: Connection) -> None:
    """In the fork; does not return."""
    from shardwise.verify.rank import rank_main

    code = 1
    try:
        rank_main(*who, pipe)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(pid: int) -> int | None:
    until = time.monotonic() + _DYING_S
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)
