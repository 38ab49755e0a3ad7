"""C++ kernels for CPUs: built once a machine, loaded, and called through ctypes.

A source is compiled for this very processor by the compiler that torch.compile needs too, into the
user's cache folder, under a name that holds all it was made from. A cached kernel is code that will
run here, so it is loaded only from a folder and files that nobody else can write (see
`shardwise.safe_files.distrust`), and only if its bytes are those that we built, by the hash in the
note beside it; anything else is built again.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from shardwise import integrity, safe_files
from shardwise.errors import DataError

log = logging.getLogger(__name__)

BUILD_SECONDS = 300.0  # of all its commands; seconds on a quiet machine

_FLAGS = (
    "-O3 -march=native -mprefer-vector-width=512 -ffp-contract=fast -fno-math-errno -fopenmp "
    "-fPIC -std=c++17"
)
_HEADER = Path(__file__).with_name("vector.h")
# What changes the compiler's result besides its arguments.
_VARIABLES = ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX")
_CPU_LINES = ("flags", "Features", "model name", "CPU part")
_MAX_BYTES = 1 << 28


class CannotBuildError(Exception):
    """A kernel cannot be compiled or loaded here; the message says why."""


def load(source: Path) -> ctypes.CDLL:
    """The compiled ``source``, which may include `vector.h`. Raises CannotBuildError.

    It is tried once a process, and a failure that a user can mend is said once.
    """
    library, reason = _loaded(source)
    if library is None:
        raise CannotBuildError(reason)
    return library


def unusable(library: Callable[[], ctypes.CDLL]) -> str | None:
    """Why ``library`` cannot be had here; None if it can."""
    try:
        library()
    except CannotBuildError as e:
        return str(e)
    return None


@functools.cache
def _loaded(source: Path) -> tuple[ctypes.CDLL | None, str]:
    if platform.system() != "Linux":
        return None, "it is built on Linux only"
    try:
        return _load(source), ""
    except (OSError, RuntimeError, DataError, subprocess.SubprocessError) as e:
        reason = f"building it failed: {e}"
    except CannotBuildError as e:
        reason = str(e)
    _say_once(reason)
    return None, reason


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("the CPU kernels are not used, PyTorch's are, which are slower: %s", reason)


def _load(source: Path) -> ctypes.CDLL:
    compiler = _compiler()
    folder = safe_files.private_folder("kernels")
    target = folder / f"{source.stem}-{_key(compiler, source)}.so"
    began = time.time()
    if (library := _cached(target)) is not None:
        return library
    with _locked(target.with_suffix(".lock")):
        if (library := _cached(target)) is not None:  # another process has built it meanwhile
            return library
        if reason := _failure(target, since=began):
            raise CannotBuildError(reason)
        try:
            _build(compiler, source, target)
        except (RuntimeError, subprocess.SubprocessError) as e:
            _note(target, {"failed": str(e), "time": time.time()})
            raise
        return _open(target)


def _compiler() -> list[str]:
    """The command that ``CXX`` names, or the first compiler that is found."""
    with contextlib.suppress(ValueError):  # an open quote
        given = shlex.split(os.environ.get("CXX", "g++"))
        if given and (found := shutil.which(given[0])):
            return [found, *given[1:]]
    if found := shutil.which("c++"):
        return [found]
    raise CannotBuildError("there is no C++ compiler")


def _key(compiler: Sequence[str], source: Path) -> str:
    """Of all that the result depends on: texts, flags, compiler, its environment and the CPU."""
    version = run_limited([*compiler, "--version"], 30.0)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = {line for line in lines if line.startswith(_CPU_LINES)}
    said = [_FLAGS, list(compiler), version, sorted(cpu), *map(os.environ.get, _VARIABLES)]
    texts = [source.read_bytes(), _HEADER.read_bytes(), json.dumps(said).encode()]
    return xxhash.xxh3_128_hexdigest(b"\0".join(texts))


def _cached(target: Path) -> ctypes.CDLL | None:
    """A kernel that was built before and is as it was built; None if there is no such."""
    try:
        for path in (target, _note_of(target)):
            if reason := safe_files.distrust(path):
                log.warning("%s; the kernel is built again", reason)
                return None
        if _read_note(target) != integrity.entry(safe_files.read_bytes(target, _MAX_BYTES)):
            log.warning("%s is not what was built; it is built again", target)
            return None
        return _open(target)
    except FileNotFoundError:
        return None
    except (OSError, DataError) as e:
        log.warning("%s cannot be loaded (%s); it is built again", target, e)
        return None


def _open(target: Path) -> ctypes.CDLL:
    # OpenMP's symbols come from PyTorch's own runtime, so that both share one thread pool.
    return ctypes.CDLL(str(target), mode=os.RTLD_NOW)


def _note_of(target: Path) -> Path:
    return target.with_suffix(".json")


def _read_note(target: Path) -> dict[str, Any]:
    """What the note says, empty when it is damaged. Raises OSError."""
    try:
        found = json.loads(safe_files.read_bytes(_note_of(target), 1 << 16))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _note(target: Path, content: dict[str, Any]) -> None:
    staged = _note_of(target).with_suffix(".tmp")  # under the lock: there is one writer
    staged.unlink(missing_ok=True)
    with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:  # noqa: PTH123
        json.dump(content, stream)
    staged.replace(_note_of(target))


def _failure(target: Path, since: float) -> str | None:
    """Why a build failed for which this process has waited: trying again would take as long."""
    try:
        note = _read_note(target)
        return str(note["failed"]) if float(note["time"]) >= since else None
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; a lock that is held for too long is no reason to wait for ever."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + BUILD_SECONDS + 30.0
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise RuntimeError(f"another process holds {path} for too long") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def _build(compiler: Sequence[str], source: Path, target: Path) -> None:
    """Compile to a temporary name and rename: a reader finds the old kernel or the new one."""
    until = time.monotonic() + BUILD_SECONDS
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        for command in (
            [*compiler, *_FLAGS.split(), "-c", str(source), "-o", str(made)],
            [*compiler, "-shared", str(made), "-o", str(linked)],  # no -fopenmp: see `_open`
        ):
            run_limited(command, until - time.monotonic(), folder)
        linked.chmod(0o700)
        _note(target, integrity.entry(safe_files.read_bytes(linked, _MAX_BYTES)))
        linked.replace(target)


def run_limited(command: Sequence[str], seconds: float, temporary: str | None = None) -> str:
    """The output of a command that is killed, with all that it started, after ``seconds``.

    Raises RuntimeError with the end of its output when it fails or takes longer.
    """
    environment = os.environ | ({"TMPDIR": temporary} if temporary else {})
    # A file, not a pipe: a process that slipped out of the group could keep a pipe open for ever.
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # a group of its own, to be killed as one
        )
        code: int | None = None
        try:
            code = child.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:  # not waited for, so its number still is its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        output.seek(0)
        text = output.read(1 << 16).decode(errors="replace").strip()
    if code is None:
        raise RuntimeError(f"{command[0]} was stopped after {seconds:.0f} s")
    if code:
        raise RuntimeError(f"{command[0]} ended with {code}: {text[:500]}")
    return text
