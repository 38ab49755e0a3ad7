"""One run a folder: who holds it, and how a second one is refused.

``FOLDER/.lock`` holds

run          a POSIX record lock of the process that runs. The kernel gives it back when that dies,
             however it dies, so none is ever stale. It reaches over hosts on NFS (v4; v3 with
             lockd), GPFS, BeeGFS, CephFS, and Lustre mounted with ``flock``.
ranks        the same, shared by the run's ranks: those that outlive their launcher still count.
holder.json  host, pid, start, boot and command, for people. Its mtime is a heartbeat, which decides
             where locks do not exist or stay on one host (NFS mounted with ``nolock`` or
             ``local_lock``, some FUSE file systems): a holder on another machine whose heart beats
             is alive. No clocks are compared, it is watched for PATIENCE seconds.

What heartbeats cannot do: two that start in the same second on hosts which share no locks are told
apart only by whose name is in the file a moment later; and a process that sleeps through PATIENCE
there may lose the folder, which it notices and ends.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from shardwise import terminal
from shardwise.config.redact import redact
from shardwise.errors import UserError
from shardwise.storage.durable import StorageError, explain, make_folder, write_durably

log = logging.getLogger(__name__)

FOLDER, HOLDER = ".lock", "holder.json"
BEAT, PATIENCE = 5.0, 20.0  # seconds between heartbeats, and without one before a holder is dead
LEAVING = 15.0  # seconds that the ranks of a run which just died may take to go
_HELD_BY_OTHERS = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: dict[Path, int] = {}  # folders held here, and by which pid: POSIX locks stop others only


class LockedError(UserError):
    """The folder belongs to another run, or cannot be written; nothing was changed."""


class RunLock:
    """A folder that this process holds until `release`, or until it dies.

    ``token`` names the holder to the ranks that it starts. Raises LockedError at once when another
    run lives there, or when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.token = secrets.token_hex(8)
        self._file = -1
        if _held.get(self.folder) == os.getpid():
            raise self._refused()
        try:
            make_folder(self.folder / FOLDER)
            self._file = _open(self.folder, "run")
            self._take()
        except BaseException as error:
            if self._file >= 0:
                os.close(self._file)
            if isinstance(error, OSError):
                raise LockedError(explain(error, error.filename or folder)) from error
            if isinstance(error, StorageError):
                raise LockedError(str(error)) from error
            raise
        _held[self.folder] = os.getpid()

    def _take(self) -> None:
        kernel = _lock(self._file, fcntl.LOCK_EX)
        if kernel is False or _lives(self.folder, by_kernel=kernel is not None):
            raise self._refused()
        ranks = _open(self.folder, "ranks")
        try:
            until = time.monotonic() + LEAVING
            while _lock(ranks, fcntl.LOCK_EX) is False:
                if time.monotonic() > until:
                    raise self._refused("; its launcher is gone, but ranks of it still live")
                time.sleep(0.1)
        finally:
            os.close(ranks)
        write_durably(self.folder / FOLDER / HOLDER, json.dumps(_me(self.token)).encode())
        if kernel is None:
            log.warning("%s: this file system has no locks; going by heartbeats", self.folder)
            time.sleep(1.0)
            if _read(self.folder).get("token") != self.token:
                raise self._refused()

    def _refused(self, more: str = "") -> LockedError:
        who = _read(self.folder)
        by = "a process that left no name"
        if who:
            by = "pid {pid} on {host} since {since} ({command})".format(**who)
        return LockedError(
            f"{self.folder}: another run lives in this folder: {by}{more}. Wait for it, stop it, "
            "or give this one a run_dir of its own"
        )

    def release(self) -> None:
        """Give the folder back."""
        if self._file < 0:
            return
        with contextlib.suppress(OSError):
            if _read(self.folder).get("token") == self.token:
                (self.folder / FOLDER / HOLDER).unlink()
        os.close(self._file)
        self._file = -1
        del _held[self.folder]

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Presence:
    """A rank of the run that holds ``folder``. Rank 0 (``token``: of the lock) beats its heart.

    If another name stands in the holder's place, the folder is lost: the process ends at once,
    before it writes another byte.
    """

    def __init__(self, folder: Path, token: str = "") -> None:
        self.folder, self.token = folder.absolute(), token
        self._file = -1
        self._stop = threading.Event()
        with contextlib.suppress(OSError):  # where it cannot be, the lock itself has said so
            self._file = _open(self.folder, "ranks")
            _lock(self._file, fcntl.LOCK_SH)
        if token:
            threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            who = _read(self.folder)
            if who and who.get("token") != self.token:
                terminal.say(
                    f"error: {self.folder}: taken over by pid {who.get('pid')} on "
                    f"{who.get('host')} while this process slept; it ends here",
                    sys.stderr,
                )
                os._exit(LockedError.exit_code)
            with contextlib.suppress(OSError):  # needs no space on the disk
                os.utime(self.folder / FOLDER / HOLDER)

    def leave(self) -> None:
        """The rank is done."""
        self._stop.set()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _open(folder: Path, name: str) -> int:
    return os.open(folder / FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def _lock(file: int, kind: int) -> bool | None:
    """Whether the lock was had at once; None where there are none. Raises OSError."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_BY_OTHERS:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _lives(folder: Path, *, by_kernel: bool) -> bool:
    """Whether the holder that left its name lives, although the kernel keeps no lock of it."""
    who = _read(folder)
    if not who:
        return False
    if all(who.get(key) == value for key, value in machine().items()):
        # This kernel knows: by the lock it does not keep, or by the process.
        return not by_kernel and _started(who.get("pid")) == who.get("started")
    last = _heartbeat(folder)
    log.warning(
        "%s: held by pid %s on %s; watching its heartbeat for %g s",
        folder, who.get("pid"), who.get("host"), PATIENCE,
    )  # fmt: skip
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(0.5)
        now = _heartbeat(folder)
        if now is None:
            return False
        if now != last:
            return True
    return False


def alive(folder: Path) -> bool:
    """Whether a run lives in ``folder``, to the best of its holder's name; takes no lock.

    On another machine by the age of the heartbeat, as that machine's and this one's clocks have it.
    """
    who = _read(folder)
    if all(who.get(key) == value for key, value in machine().items()):
        return _started(who.get("pid")) == who.get("started")
    beat = _heartbeat(folder) if who else None
    return beat is not None and time.time() - beat / 1e9 < PATIENCE


def _heartbeat(folder: Path) -> int | None:
    """The mtime of the holder's file; opening it makes an NFS client ask the server."""
    try:
        with (folder / FOLDER / HOLDER).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _read(folder: Path) -> dict[str, Any]:
    """What the holder says of itself; empty if nobody does, or it cannot be read."""
    try:
        who = json.loads((folder / FOLDER / HOLDER).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    named = isinstance(who, dict) and {"host", "pid", "since", "command", "token"} <= who.keys()
    return who if named else {}


def machine() -> dict[str, str]:
    """What tells one kernel and process table from another."""
    found = {"host": socket.gethostname(), "boot": "", "namespace": ""}
    with contextlib.suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["namespace"] = str(Path("/proc/self/ns/pid").readlink())
    return found


def _me(token: str) -> dict[str, Any]:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    command = redact(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    who = {"pid": os.getpid(), "started": _started(os.getpid()), "since": since}
    return {**machine(), **who, "command": command, "token": token}


def _started(pid: Any) -> str | None:
    """When a process of this machine started, in ticks since boot; None if it does not live."""
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        with contextlib.suppress(OSError, ValueError, TypeError):
            os.kill(int(pid), 0)
            return ""  # it lives, on a machine without /proc
        return None
