"""C++ kernels for CPUs: built once a machine, loaded, and called through ctypes.

A source is compiled for this very processor by the compiler that torch.compile needs too, into the
user's cache folder, under a name that holds all it was made from.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import xxhash

_FLAGS = (
    "-O3 -march=native -mprefer-vector-width=512 -ffp-contract=fast -fno-math-errno -fopenmp "
    "-fPIC -std=c++17"
)
_HEADER = Path(__file__).with_name("vector.h")


class CannotBuildError(Exception):
    """A kernel cannot be compiled or loaded here; the message says why."""


def load(source: Path) -> ctypes.CDLL:
    """The compiled ``source``, which may include `vector.h`. Raises CannotBuildError."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if platform.system() != "Linux":
        raise CannotBuildError("it is built on Linux only")
    if compiler is None:
        raise CannotBuildError("there is no C++ compiler")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        machine = "".join(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line[:8]
        )[:10_000]
        texts = [source.read_bytes(), _HEADER.read_bytes(), _FLAGS.encode()]
        key = xxhash.xxh3_128_hexdigest(b"\0".join([*texts, version, machine.encode()]))
        root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        target = Path(root) / "shardwise" / f"{source.stem}-{key}.so"
        if not target.exists():
            _compile(compiler, source, target)
        # OpenMP's symbols come from PyTorch's own runtime, so that both share one thread pool.
        return ctypes.CDLL(str(target), mode=os.RTLD_NOW)
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        raise CannotBuildError(f"building it failed: {e}") from e


def unusable(library: Callable[[], ctypes.CDLL]) -> str | None:
    """Why ``library`` cannot be had here; None if it can."""
    try:
        library()
    except CannotBuildError as e:
        return str(e)
    return None


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Compile to a temporary name and rename: several ranks may do so at once."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        for command in (
            [compiler, *_FLAGS.split(), "-c", str(source), "-o", str(made)],
            [compiler, "-shared", str(made), "-o", str(linked)],  # no -fopenmp: see above
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip()[:500])
        linked.replace(target)
