"""What a rank of a small distributed loop does wrong, or does that only looks wrong."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from shardwise.config.schema import ResilienceConfig
from shardwise.resilience import hang
from shardwise.resilience.gate import Gate
from shardwise.resilience.stop import Stop

CULPRIT, AT = 1, 8
HARMLESS = ("computes", "compiles", "waits")


def _compute() -> None:
    """Busy for some seconds, in C, with the interpreter held."""
    until = time.monotonic() + 5.0
    while time.monotonic() < until:
        re.match(r"(a+)+$", "a" * 22 + "b")


def loop(folder: str, how: str) -> None:
    """Steps of three collectives each; rank 1 does ``how`` in the ninth."""
    steps = AT + (3 if how in HARMLESS else 10**6)
    hang.BEAT_SECONDS = 0.5
    config = ResilienceConfig(stopped_s=1.0, stuck_s=2.5)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with Stop(config, Gate()) as stop:
        stop.join(Path(folder))
        with hang.watched(stop, Path(folder, "logs"), 600.0):
            for step in range(steps):
                fault = how if dist.get_rank() == CULPRIT and step == AT else ""
                value = torch.ones(4)
                dist.broadcast(value, src=0)
                if fault == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif fault == "asleep":
                    ctypes.PyDLL(None).sleep(60)  # with the interpreter held
                elif fault == "computes":
                    _compute()
                elif fault == "compiles":
                    subprocess.run([sys.executable, "-c", "import torch"], check=True)
                elif fault == "waits":
                    time.sleep(5.0)  # for a reward function, a file system
                if fault != "skips":
                    dist.all_reduce(value)
                dist.barrier()
