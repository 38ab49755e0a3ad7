"""One run a folder: held as long as its process lives, and not a moment longer."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwise.storage import lock
from shardwise.storage.lock import LockedError, Presence, RunLock
from tests.support.daily import daily


@contextlib.contextmanager
def process(body: Callable[[], object]) -> Iterator[int]:
    """A fork that does ``body``, says so, and sleeps until it is killed."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            kept = body()
            os.write(told, b"x")
            time.sleep(600)
            del kept
        os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_second_is_told_who_the_first_is_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    with process(lambda: RunLock(tmp_path)) as pid:
        before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
        with pytest.raises(LockedError, match=rf"pid {pid} on {os.uname().nodename} since") as told:
            RunLock(tmp_path)
        assert told.value.exit_code == 2 and "pytest" in str(told.value)
        assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
        kill(pid)
        with RunLock(tmp_path), pytest.raises(LockedError):
            RunLock(tmp_path)  # nor twice in one process
        with RunLock(tmp_path):
            assert json.loads((tmp_path / ".lock/holder.json").read_text())["pid"] == os.getpid()
        assert not (tmp_path / ".lock/holder.json").exists()


def test_ranks_that_outlive_their_launcher_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LEAVING", 0.1)
    RunLock(tmp_path).release()
    with process(lambda: Presence(tmp_path)) as pid:
        with pytest.raises(LockedError, match="ranks of it still live"):
            RunLock(tmp_path)
        kill(pid)
        RunLock(tmp_path).release()


def left_by(folder: Path, **who: Any) -> Path:
    """The name of a holder whom this kernel keeps no lock of."""
    RunLock(folder).release()
    held = lock._me("another") | who
    path: Path = folder / ".lock" / "holder.json"
    path.write_text(json.dumps(held))
    return path


@pytest.mark.parametrize(
    ("other", "kernel"),
    daily(
        itertools.product([{"host": "far"}, {"boot": "b"}, {"namespace": "n"}], [True, False]),
        *(0, 3, 4),
    ),
)
def test_a_holder_elsewhere_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool, other: dict[str, str]
) -> None:
    """Whether or not locks seem to work here: they may not reach that far."""
    if not kernel:
        monkeypatch.setattr(lock, "_lock", lambda file, kind: None)
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    path = left_by(tmp_path, pid=1, **other)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(LockedError, match="pid 1 on "):
        RunLock(tmp_path)
    stop.set()
    thread.join()
    RunLock(tmp_path).release()  # its heart no longer beats


def test_without_locks_a_process_of_this_machine_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_lock", lambda file, kind: None)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    left_by(tmp_path)
    with pytest.raises(LockedError):
        RunLock(tmp_path)
    left_by(tmp_path / "reused", started="0")  # another process has its pid now
    RunLock(tmp_path / "reused").release()
    left_by(tmp_path / "dead", pid=2**22 + 1)
    RunLock(tmp_path / "dead").release()


def test_whoever_lost_the_folder_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)

    def hold() -> object:
        held = RunLock(tmp_path)
        return held, Presence(tmp_path, held.token)

    with process(hold) as pid:
        path = tmp_path / ".lock" / "holder.json"
        first = path.stat().st_mtime_ns
        until = time.monotonic() + 30
        while path.stat().st_mtime_ns == first and time.monotonic() < until:
            time.sleep(0.02)
        assert path.stat().st_mtime_ns != first  # a heart that beats
        lock.write_durably(path, json.dumps(lock._me("another")).encode())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2


@pytest.mark.parametrize("damage", [b"", b"\0" * 99, b"[]", b'{"pid": 3}'])
def test_a_damaged_name_holds_nothing_and_hides_nobody(tmp_path: Path, damage: bytes) -> None:
    with process(lambda: RunLock(tmp_path)) as pid:
        (tmp_path / ".lock" / "holder.json").write_bytes(damage)
        with pytest.raises(LockedError, match="a process that left no name"):
            RunLock(tmp_path)
        kill(pid)
        RunLock(tmp_path).release()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LockedError, match="file: cannot be written"):
        RunLock(tmp_path / "file" / "run")
