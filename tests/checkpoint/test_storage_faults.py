"""Full, read-only, flaky and slow storage (fault rows 4 and 5)."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from shardwise import checkpoint
from shardwise.checkpoint import Writer
from shardwise.errors import CheckpointError
from tests.checkpoint.tools import content, newest, patched, save
from tests.support.pool import CONTEXT

LARGE = {"w": torch.ones(1 << 19)}  # 2 MiB


def after_a_failed_save(root: Path) -> list[str]:
    """What a training loop does when the disk is full: go on, and save less later."""
    save(root, 1)
    told = []
    for attempt in (lambda: checkpoint.save(root, 2, LARGE, {}), lambda: _in_background(root)):
        try:
            attempt()
        except CheckpointError as error:
            told.append(str(error))
        assert sorted(p.name for p in root.iterdir()) == ["latest.json", "step_00000001"]
        assert newest(root) == 1
    save(root, 3)
    assert newest(root) == 3
    return told


def _in_background(root: Path) -> None:
    with checkpoint.AsyncSaver(root) as saver:
        saver.save(2, LARGE, {})


def limited(root: Path, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    pipe.send(after_a_failed_save(root))


def on_a_tmpfs(root: Path, pipe: Connection) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private = 0x20000, 0x10000000, (1 << 18) | 0x4000
    if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user):
        pipe.send(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
        return
    if libc.mount(b"none", b"/", None, private, None) or libc.mount(
        b"tmpfs", bytes(root), b"tmpfs", 0, b"size=1m"
    ):
        pipe.send(f"no tmpfs: {os.strerror(ctypes.get_errno())}")
        return
    pipe.send(after_a_failed_save(root))


def answer(target: object, root: Path) -> object:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=target, args=(root, theirs))  # type: ignore[arg-type]
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    assert process.exitcode == 0
    return found


def test_a_file_size_limit_reads_as_disk_full(tmp_path: Path) -> None:
    told = answer(limited, tmp_path)
    assert isinstance(told, list) and len(told) == 2
    for message in told:
        assert "disk full (a file size limit or quota)" in message
        assert "shard-00000-000.safetensors" in message


def test_a_full_disk(tmp_path: Path) -> None:
    told = answer(on_a_tmpfs, tmp_path)
    if isinstance(told, str):
        pytest.skip(told)
    assert isinstance(told, list) and len(told) == 2
    assert all("disk full; free some space" in message for message in told)


def failing(method: str, number: int, times: int) -> tuple[Writer, list[float]]:
    """A writer whose ``method`` fails ``times`` times with ``number``, and its pauses."""
    pauses: list[float] = []
    writer = Writer(retries=3, backoff_seconds=0.25, sleep=pauses.append)
    original = getattr(writer, method)
    left = [times]

    def flaky(*args: object) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return original(*args)

    setattr(writer, method, flaky)
    return writer, pauses


@pytest.mark.parametrize("method", ["open", "write", "sync"])
def test_transient_faults_are_retried(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer, pauses = failing(method, errno.EIO, 2)
    save(tmp_path, 1, writer=writer)
    assert newest(tmp_path) == 1
    assert checkpoint.verify(tmp_path) == []
    assert pauses == [0.25, 0.5]
    assert "trying again in 0.5 s" in caplog.text


@pytest.mark.parametrize("method", ["open", "write", "sync"])
def test_retries_are_bounded(tmp_path: Path, method: str) -> None:
    save(tmp_path, 1)
    writer, pauses = failing(method, errno.EIO, 1000)
    with pytest.raises(CheckpointError, match="cannot be written after 3 retries"):
        save(tmp_path, 2, writer=writer)
    assert pauses == [0.25, 0.5, 1.0]
    assert newest(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step_00000001"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "disk full"),
        (errno.EDQUOT, "disk full"),
        (errno.EACCES, "no permission"),
    ],
)
def test_lasting_faults_are_told_at_once(tmp_path: Path, number: int, message: str) -> None:
    writer, pauses = failing("write", number, 1000)
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1, writer=writer)
    assert pauses == [] and list(tmp_path.iterdir()) == []


def test_a_pointer_that_cannot_be_written_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)

    def full() -> None:
        raise CheckpointError("latest.json: disk full")

    save(tmp_path, 2, writer=patched("pointer", full), keep=1)
    assert "step 2 is saved, but not all that follows: latest.json: disk full" in caplog.text
    assert newest(tmp_path) == 2 and checkpoint.list_steps(tmp_path) == [1, 2]
    save(tmp_path, 3, keep=1)
    assert newest(tmp_path) == 3 and checkpoint.list_steps(tmp_path) == [3]


def test_what_cannot_be_pruned_is_only_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    save(tmp_path, 1)
    save(tmp_path, 2, writer=patched("remove_tree", read_only), keep=1)
    assert "its space stays taken" in caplog.text
    assert checkpoint.list_steps(tmp_path) == [2] and newest(tmp_path) == 2
    save(tmp_path, 3)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_slow_storage_does_not_block_the_loop_and_raises_an_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The storage hangs in a retry for as long as the loop runs, then fails for good."""
    hanging, steps_done = threading.Event(), 0

    def sleep(seconds: float) -> None:
        assert hanging.wait(60)

    writer = Writer(retries=1, sleep=sleep)

    def broken(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    writer.open = broken  # type: ignore[method-assign, assignment]
    saver = checkpoint.AsyncSaver(tmp_path, writer=writer)
    saver.save(1, content(1), {"step": 1})
    for _ in range(100):
        steps_done += 1
        assert saver.in_flight
    hanging.set()
    with caplog.at_level(logging.ERROR), pytest.raises(CheckpointError, match="after 1 retries"):
        saver.close()
    assert steps_done == 100 and "the checkpoint of step 1 was not saved" in caplog.text
