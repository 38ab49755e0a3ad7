"""A run on a disk whose power is cut at random moments: each restart goes on, the end is the same.

The disk is an ext4 in a file, mounted over a loop device; the kernel's shutdown call drops all that
was not flushed, as a power cut does.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise import checkpoint
from tests.stages.recipes import recipe, weights

CUTS = 20
SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
pytestmark = pytest.mark.slow


class Disk:
    """An ext4 of its own, whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self.image, self.root = folder / "disk", folder / "mounted"
        self.root.mkdir()
        with self.image.open("wb") as file:
            file.truncate(96 << 20)
        subprocess.run(["mkfs.ext4", "-q", self.image], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.root], check=True)

    def cut(self, process: subprocess.Popen[bytes] | None = None) -> None:
        """Without a warning: what was not on the disk is gone. Then the power is back."""
        handle = os.open(self.root, os.O_RDONLY)
        fcntl.ioctl(handle, SHUTDOWN, ctypes.c_uint32(WITHOUT_FLUSH))
        os.close(handle)
        if process is not None:
            process.kill()
            process.wait()
        subprocess.run(["umount", "-l", self.root], check=True)
        # A copy: whoever has a mount namespace of his own may still hold the old one, shut down.
        fresh = self.image.with_name(f"{self.image.name}+")
        subprocess.run(["cp", "--sparse=always", self.image, fresh], check=True)
        self.image.unlink()
        self.image = fresh
        self.mount()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.getuid() or not shutil.which("mkfs.ext4") or not Path("/dev/loop-control").exists():
        pytest.skip("needs root, mkfs.ext4 and loop devices")
    disk = Disk(tmp_path)
    yield disk
    subprocess.run(["umount", "-l", disk.root], check=False)


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "shardwise", "train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out)


def lines(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return -1


def wait_for(process: subprocess.Popen[bytes], run: Path, num_lines: int) -> None:
    """Until the run has logged some more lines; 0: until it has made anything in this start."""
    before, wanted = seen(run), max(lines(run), 0) + num_lines
    while process.poll() is None and (
        seen(run) == before if num_lines == 0 else lines(run) < wanted
    ):
        time.sleep(0.01)


def seen(run: Path) -> set[tuple[str, int]]:
    """The side files as they are."""
    return {(p.name, p.stat().st_ino) for p in run.glob("*")}


def prepared(folder: Path, run: Path) -> tuple[dict[str, Any], Path]:
    config = recipe(run, "pretrain", tokenizer={"kind": "bpe", "vocab_size": 270})
    config["stages"][0] |= {"steps": 260, "validation": {"every": 50}}
    config["stages"][0]["checkpoint"] = {"every": 3, "keep": 2}
    file = folder / f"{run.name}.yaml"
    file.write_text(json.dumps(config))
    return config, file


def test_twenty_power_cuts(tmp_path: Path, disk: Disk) -> None:
    rng = random.Random(12)
    run, log = disk.root / "runs" / "run", tmp_path / "log"
    _, clean = prepared(tmp_path, tmp_path / "work" / "clean")
    assert start(clean, log).wait() == 0, log.read_text()
    _, config = prepared(tmp_path, run)
    os.sync()
    reached = []
    for number in range(CUTS):
        process = start(config, log)
        # every third in the first moments, where the side files are made
        wait_for(process, run, 0 if number % 3 == 0 else rng.randrange(1, 12))
        time.sleep(rng.random() * 0.3)
        assert process.poll() in (None, 0), log.read_text()
        disk.cut(process)
        reached.append(max(checkpoint.list_steps(run / "stages/pretrain/checkpoints"), default=0))
    assert reached == sorted(reached), reached  # what counted once, counts
    assert start(config, log).wait() == 0, log.read_text()
    assert checkpoint.verify(run / "stages/pretrain/checkpoints") == []
    a, b = weights(run, "pretrain"), weights(tmp_path / "work" / "clean", "pretrain")
    assert all(torch.equal(a[name], b[name]) for name in b)
    print("steps on disk after each cut:", reached)
