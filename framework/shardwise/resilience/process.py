"""What the kernel says of a process (Linux; elsewhere nothing is known, and nothing is judged)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from shardwise.errors import exit_code_of_signal

_TICKS = os.sysconf("SC_CLK_TCK")


def _fields(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def state(pid: int) -> str:
    """R running, S asleep, D in the kernel, T stopped, t traced, Z dead; "" unknown."""
    fields = _fields(pid)
    return fields[0] if fields else ""


def gone(pid: int) -> bool:
    """Whether there is no such process any more."""
    return bool(_fields(os.getpid())) and state(pid) in ("", "Z")


def cpu_seconds(pid: int) -> float:
    """What a process and its living descendants have computed (a compiler is a child)."""
    fields = _fields(pid)
    if not fields:
        return 0.0
    own = sum(int(v) for v in fields[11:15]) / _TICKS  # utime, stime, and of children waited for
    return own + sum(cpu_seconds(child) for child in _children(pid))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.scandir(f"/proc/{pid}/task"):
            found += map(int, Path(task.path, "children").read_text().split())
    except OSError:
        pass
    return found


def die_with(parent: int) -> None:
    """Ask the kernel for a SIGKILL when the parent dies, however it dies (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(exit_code_of_signal(signal.SIGKILL))
