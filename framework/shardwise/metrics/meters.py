"""Meters: throughput, memory, and what is known about the host."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch

GB = 1e9


class Throughput:
    """Tokens per second over the last ``window`` steps, and what it means in FLOPs.

    Give it steady steps only: not the first of a process, which compiles and warms up, and neither
    validation nor saving.

    ``flops_per_token`` is see `shardwise.metrics.flops`; ``limit_flops`` the rate to compare
    with, in FLOP/s over all ranks (the machine's GEMM rate, or the GPUs' peak). Either may be
    None, and the metrics that need it are then absent.
    """

    def __init__(
        self,
        flops_per_token: float | None = None,
        limit_flops: float | None = None,
        window: int = 20,
    ) -> None:
        self.flops_per_token = flops_per_token
        self.limit_flops = limit_flops
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)
        self.num_tokens = 0
        self.seconds = 0.0

    def keep(self, window: int) -> None:
        """Average over this many of the last steps from now on."""
        self._steps = deque(self._steps, maxlen=window)

    def update(self, num_tokens: int, seconds: float) -> dict[str, float]:
        """Add a step of ``num_tokens`` over all ranks; returns the metrics of the window."""
        self._steps.append((num_tokens, seconds))
        self.num_tokens += num_tokens
        self.seconds += seconds
        tokens = sum(t for t, _ in self._steps)
        return self._metrics(tokens, sum(s for _, s in self._steps))

    def total(self) -> dict[str, float]:
        """The same metrics over everything seen."""
        return self._metrics(self.num_tokens, self.seconds)

    def _metrics(self, tokens: float, seconds: float) -> dict[str, float]:
        if seconds <= 0:
            return {}
        metrics = {"tokens_per_second": tokens / seconds}
        if self.flops_per_token:
            flops = metrics["tokens_per_second"] * self.flops_per_token
            metrics["model_tflops"] = flops / 1e12
            if self.limit_flops:
                metrics["fraction_of_gemm"] = flops / self.limit_flops
        return metrics


def memory_metrics(device: torch.device | str = "cpu") -> dict[str, float]:
    """Memory of this process in GB (1e9 bytes): resident set, its peak, and CUDA's peaks.

    ``memory_gb`` is the figure to watch: CUDA's peak of allocated memory on a GPU, the resident
    set's peak on a CPU.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_gb = peak * (1 if sys.platform == "darwin" else 1024) / GB
    metrics = {"memory_gb": peak_gb, "rss_gb": _resident_bytes() / GB or peak_gb}
    device = torch.device(device)
    if device.type == "cuda":
        metrics["memory_gb"] = torch.cuda.max_memory_allocated(device) / GB
        metrics["cuda_reserved_gb"] = torch.cuda.max_memory_reserved(device) / GB
    return metrics


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def host_info() -> dict[str, Any]:
    """What a reader needs to judge a figure: processor, cores, load, threads, versions, GPUs.

    Neither host name, user, path nor environment is in it.
    """
    info: dict[str, Any] = {
        "processor": _processor(),
        "num_cores": num_cores(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads_per_process": torch.get_num_threads(),
        "memory_gb": round(total_memory() / GB, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        info["cuda"] = torch.version.cuda
    return info


def num_cores() -> int:
    """Cores that this process may run on (in a container or under taskset fewer than there are)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# What a container may use, as it sees it: cgroup v2 and v1.
_LIMITS = tuple(
    Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory/memory.limit_in_bytes")
)


def total_memory() -> int:
    """Bytes that this machine has, or a container around this process may use; 0: not known."""
    try:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (ValueError, OSError):
        return 0
    for limit in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            found.append(int(limit.read_text()))
    return min(found)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
