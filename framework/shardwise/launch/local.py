"""N ranks on this machine, under one supervisor.

Ranks are forked from the launcher once it has imported everything: `import torch` costs seconds,
and a fork shares it. That is safe only while the launcher is single-threaded, has run no tensor
operation (OpenMP's threads do not survive a fork) and has no CUDA driver to lose; otherwise each
rank is a fresh interpreter. Either way a rank runs `shardwise.launch.rank.run`.

The rendezvous is a TCP store that the launcher itself holds on a port the kernel chose, so there
is no port to collide with, and no rank's death takes the store away. The first rank that fails
ends the run: the launcher finds the root cause (a rank that lost its peer is a consequence), stops
the others, and prints one line. A signal is passed on, and the ranks are given time to save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from shardwise.errors import ExitCode, ShardwiseError, UserError, exit_code_of_signal
from shardwise.launch import rank as rank_room
from shardwise.launch.failure import Failure, root_cause
from shardwise.launch.rank import Job
from shardwise.metrics.meters import num_cores
from shardwise.resilience import process
from shardwise.resilience.stop import ECHO_SECONDS, SIGNALS, heeded

POLL_SECONDS = 0.05
SETTLE_SECONDS = 1.0  # after the first failure: time for the true cause to report
GRACE_SECONDS = 10.0  # between the request to stop and SIGKILL
SPARE_SECONDS = 5.0  # for ranks to end by themselves once their grace period is over


class LaunchError(ShardwiseError):
    """A rank failed; the message names it, its error and its log."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclasses.dataclass
class _Rank:
    number: int
    pid: int
    code: int | None = None  # exit code; negative: the signal that killed it
    ended: float = 0.0

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.ended = time.time()
        return self.code is not None

    def signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if not self.poll():
            os.kill(self.pid, number)


def launch_local(
    target: str,
    args: Sequence[Any],
    nproc: int,
    logs: Path,
    grace_s: float = GRACE_SECONDS,
) -> None:
    """Call ``target`` (``module:function``) with ``args`` (JSON) on ``nproc`` ranks; wait for all.

    Each rank finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment,
    as under torchrun. Rank 0 keeps this terminal; what the others write goes to
    ``logs/rank_N.log``. SIGINT, SIGTERM, SIGUSR1 and SIGHUP are passed on to the ranks, which have
    ``grace_s`` seconds to save and end; a second signal kills them. Those that this process was
    started to ignore (``nohup``) stay ignored.

    Raises LaunchError with the root cause's exit code, or with 85 when the ranks have saved and
    ended as a signal asked them to, after the last rank has ended: no process and no port stays
    behind.
    """
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: at least one process is needed")
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank_*"):
        old.unlink()
    job = Job(target, tuple(args), str(logs))
    listener = socket.create_server(("127.0.0.1", 0))
    common = rank_environment(nproc, listener.getsockname()[1])
    start = _fork if _fork_is_safe() else _execute
    ranks: list[_Rank] = []
    with _signals(ranks) as received:
        try:
            for number in range(nproc):
                environment = {**common, "RANK": str(number), "LOCAL_RANK": str(number)}
                ranks.append(start(number, job, environment, listener))
            store = _serve(listener, nproc)
            _supervise(ranks, job, received, grace_s)
            del store
        finally:
            _stop(ranks, signal.SIGKILL, 0)
            listener.close()


def rank_environment(nproc: int, port: int) -> dict[str, str]:
    """What all ranks of a local launch share; each adds RANK and LOCAL_RANK."""
    threads = str(max(1, num_cores() // nproc))
    return {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch: the store is there, be its client
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", _loopback()),
    }


def _supervise(ranks: list[_Rank], job: Job, received: list[int], grace_s: float) -> None:
    while not _all_ended(ranks):
        if received or any(rank.code == ExitCode.REQUEUE for rank in ranks):
            _stop(ranks, None, grace_s + SPARE_SECONDS)
        elif any(_failed(rank, job) for rank in ranks):
            _wait(ranks, SETTLE_SECONDS)
            break
        time.sleep(POLL_SECONDS)
    ended = [rank for rank in ranks if rank.poll()]
    _stop(ranks, signal.SIGKILL, 0)  # they have lost a peer: nothing can be saved
    failures = [
        Failure.read(rank.number, rank.code, rank.ended, job)
        for rank in ended
        if _failed(rank, job)
    ]
    # A save is committed by all ranks or by none, so one that says so speaks for all.
    if saved := [f for f in failures if f.exit_code == ExitCode.REQUEUE]:
        raise LaunchError(saved[0].text, ExitCode.REQUEUE)
    if received and failures:
        told = [f.text for f in failures if f.expected]
        name = signal.Signals(received[0]).name
        raise LaunchError(
            told[0] if told else f"stopped by {name}, not saved", exit_code_of_signal(received[0])
        )
    if failures:
        cause = root_cause(failures)
        raise LaunchError(cause.sentence(len(ranks)), cause.exit_code)


def _failed(rank: _Rank, job: Job) -> bool:
    """Whether a rank has ended badly: also one that says all is well before its work was done."""
    return rank.poll() and (rank.code != 0 or not job.done(rank.number).exists())


def _all_ended(ranks: list[_Rank]) -> bool:
    return [rank.poll() for rank in ranks].count(False) == 0  # asks every one


def _wait(ranks: list[_Rank], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not _all_ended(ranks):
        time.sleep(POLL_SECONDS)


def _stop(ranks: list[_Rank], request: int | None, grace: float) -> None:
    """Send ``request``, wait for at most ``grace`` seconds, then kill; returns when all ended."""
    if request is not None:
        for rank in ranks:
            rank.signal(request)
    for rank in ranks:
        if process.state(rank.pid) in ("T", "t"):
            rank.signal(signal.SIGKILL)  # it takes no request
    _wait(ranks, grace)
    for rank in ranks:
        rank.signal(signal.SIGKILL)
    while not _all_ended(ranks):
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _signals(ranks: list[_Rank]) -> Iterator[list[int]]:
    """Pass signals on to the ranks; a second one kills them."""
    received: list[int] = []
    first = 0.0  # when it came

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        first = first or now
        if number in received and number != signal.SIGINT and now <= first + ECHO_SECONDS:
            return
        received.append(number)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number if len(received) == 1 else signal.SIGKILL)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    old = {n: signal.signal(n, forward) for n in heeded((signal.SIGINT, *SIGNALS))}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _fork_is_safe() -> bool:
    if sys.platform != "linux" or threading.active_count() > 1:
        return False
    import torch

    tasks = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    return tasks == 1 and torch.version.cuda is None and torch.version.hip is None


def _fork(number: int, job: Job, environment: dict[str, str], listener: socket.socket) -> _Rank:
    launcher = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return _Rank(number, pid)
    code = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C reaches the launcher alone, which passes it on once
        for stop in heeded((signal.SIGINT, *SIGNALS)):
            default = signal.default_int_handler if stop == signal.SIGINT else signal.SIG_DFL
            signal.signal(stop, default)
        listener.close()
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        code = rank_room.run(job, environment, launcher)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _execute(number: int, job: Job, environment: dict[str, str], _: socket.socket) -> _Rank:
    command = [sys.executable, "-m", rank_room.__name__, str(os.getpid())]
    whole = {**os.environ, **environment, rank_room.JOB: job.dumps()}
    process = subprocess.Popen(command, env=whole, process_group=0)
    rank = _Rank(number, process.pid)
    process.returncode = 0  # we wait for the pid ourselves
    return rank


def _serve(listener: socket.socket, nproc: int) -> Any:
    """The rendezvous store, in this process; made after the forks since it starts a thread."""
    import torch.distributed as dist

    host, port = listener.getsockname()[:2]
    return dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        nproc,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=os.dup(listener.fileno()),
    )


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])
