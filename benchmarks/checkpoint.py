"""Save and load rates of checkpoints, beside torch.save, DCP and the disk itself.

    python benchmarks/checkpoint.py [--gigabytes 1] [--folder DIR] [--repeats 3]

One process. The limits are measured in the same run: a plain write of the same bytes with one
fsync, and a plain read. Repeats are interleaved, the best of each is shown. torch.save neither
hashes nor syncs; both facts are in its favour here. Loads come from the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

from shardwise import checkpoint


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def write_plain(path: Path, data: memoryview) -> None:
    """The limit of a save: the bytes, one after the other, and one fsync."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])
        os.fsync(file.fileno())


def read_plain(path: Path, into: memoryview) -> None:
    """The limit of a load."""
    with path.open("rb", buffering=0) as file:
        while len(into) and (count := file.readinto(into)):
            into = into[count:]


def main() -> None:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    num_rows = int(options.gigabytes * 1e9 / 4 / 1024 / 16)
    tensors = {f"model.layers.{i}.weight": torch.randn(num_rows, 1024) for i in range(16)}
    into = {name: torch.empty_like(t) for name, t in tensors.items()}
    flat = torch.cat([t.view(-1) for t in tensors.values()]).view(torch.uint8).numpy().data
    scratch = bytearray(len(flat))
    folder = Path(tempfile.mkdtemp(prefix="shardwise-bench-", dir=options.folder))
    root, other, plain = folder / "run", folder / "torch.pt", folder / "plain"
    saver = checkpoint.AsyncSaver(folder / "async")

    def save() -> None:
        checkpoint.save(root, 1, tensors, {})

    def save_async() -> None:
        saver.save(1, tensors, {})

    def load(verify: str) -> Callable[[], object]:
        return lambda: checkpoint.load(root, into, verify=verify)  # type: ignore[arg-type]

    actions: dict[str, Callable[[], object]] = {
        "plain write + fsync": lambda: write_plain(plain, flat),
        "torch.save": lambda: torch.save(tensors, other),
        "shardwise save": save,
        "shardwise async: the loop waits": save_async,
        "plain read": lambda: read_plain(plain, memoryview(scratch)),
        "torch.load (weights_only)": lambda: torch.load(other, weights_only=True),
        "shardwise load, verify off": load("off"),
        "shardwise load, verify fast": load("fast"),
        "shardwise load, verify full": load("full"),
        "xxh3-128 in memory": lambda: xxhash.xxh3_128_hexdigest(flat),
    }
    best = dict.fromkeys(actions, float("inf"))
    try:
        for _ in range(options.repeats):
            for name, action in actions.items():
                best[name] = min(best[name], seconds(action))
                if action is save_async:
                    saver.wait()
                os.sync()  # what one leaves unwritten must not slow the next
        print(f"{len(flat) / 1e9:.2f} GB, best of {options.repeats}, load {os.getloadavg()[0]:.1f}")
        for name, taken in best.items():
            print(f"{name:34s} {taken:7.3f} s  {len(flat) / 1e9 / taken:6.2f} GB/s")
        print(f"save / plain write   {best['plain write + fsync'] / best['shardwise save']:.2f}")
        full = best["shardwise load, verify full"]
        print(f"load / plain read    {best['plain read'] / full:.2f}")
    finally:
        saver.close()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
