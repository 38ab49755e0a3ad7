"""What a rank process of the pool does: it waits for calls, makes them, says what went wrong."""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import gc
import os
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import spawn
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

PACKAGE = Path(__file__).resolve().parents[1]
# The pool decides that a rank hangs, and asks where; gloo's own patience must not end first.
_PATIENCE = timedelta(hours=6)
_PR_SET_PDEATHSIG = 1


class ByValue(ForkingPickler):
    """Tensors travel as numbers: torch's own way shares memory, at a descriptor for each."""

    _extra_reducers: ClassVar[dict[type, Any]] = {}


def _numbers(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _tensor, (flat, tensor.dtype, tuple(tensor.shape))


def _tensor(flat: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(flat).view(dtype).view(shape)


ByValue.register(Tensor, _numbers)


@dataclasses.dataclass(frozen=True)
class Failure:
    """An exception of a rank.

    ``where``: the innermost frame in the package or in a user's code, as `place` writes it;
    ``caller``: the innermost in another file of the package, which tells what it was done for;
    ``seconds``: when it was raised, by a clock that the ranks of a machine share.
    """

    cause: str
    message: str
    where: str
    caller: str
    seconds: float
    text: str


def stack_file(folder: str | Path, rank: int) -> Path:
    """Where a rank writes its stack when it gets SIGXCPU."""
    return Path(folder) / f"stack_{rank}"


def place(file: str, line: int | None, function: str) -> str:
    """``parallel/context.py:120 in merge``: relative to the package, or to the current folder."""
    path = Path(file)
    for root in (PACKAGE, Path.cwd()):
        if path.is_relative_to(root):
            path = path.relative_to(root)
            break
    return f"{path}:{line} in {function}"


def is_ours(file: str) -> bool:
    """Whether a file belongs to the package or a user, not to Python or an installed library."""
    if file.startswith("<"):
        return False
    path = Path(file)
    if path.is_relative_to(PACKAGE) or "shardwise_kernels" in path.parts:
        return path != Path(__file__)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and not path.is_relative_to(sysconfig.get_paths()["stdlib"])


def _places(trace: TracebackType | None) -> tuple[str, str]:
    """Where it was raised, and for whom: see `Failure`."""
    frames = traceback.extract_tb(trace)
    *outer, last = [f for f in frames if is_ours(f.filename)] or frames
    callers = [f for f in outer if f.filename != last.filename and _is_product(f.filename)]
    where, *caller = (place(f.filename, f.lineno, f.name) for f in (last, *callers[-1:]))
    return where, "".join(caller)


def _is_product(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "verify")


def import_main(file: str | None) -> None:
    """Run the caller's script as a module, for functions that stand in it."""
    if file is None:
        raise ValueError("ranks cannot find functions of a session without a file; use a module")
    spawn.import_main_path(file)


def rank_main(rank: int, world: int, folder: str, backend: str, pipe: Connection) -> None:
    """Join a process group of ``world`` ranks, then answer calls until the pipe ends."""
    gc.freeze()  # a collection would touch, and so copy, what is shared with the server
    gc.enable()
    if sys.platform == "linux":  # a rank that waits for peers does not outlive the server
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pool ends its ranks
    # On CPUs as if on two nodes, so that a rank's number in its node is not that in the world.
    node = world if backend != "gloo" else -(-world // 2)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank % node),
        LOCAL_WORLD_SIZE=str(node),
        GROUP_RANK=str(rank // node),
    )
    torch.set_num_threads(1)
    # What a rank writes is small and soon removed; nobody reads it after the machine went down.
    os.fsync = lambda fd: None
    with stack_file(folder, rank).open("w") as stacks:
        faulthandler.register(signal.SIGXCPU, stacks)
        dist.init_process_group(
            backend,
            store=dist.FileStore(f"{folder}/store", world),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world,
            timeout=_PATIENCE,
        )
        while True:
            try:
                call = pipe.recv()
            except EOFError:
                return
            answer = _answer(*call)
            try:
                pipe.send_bytes(answer)
            except BrokenPipeError:  # the caller has given up
                return


def _answer(folder: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> bytes:
    try:
        os.chdir(folder)  # the caller's, of now
        return bytes(ByValue.dumps(fn(*args, **kwargs)))
    except BaseException as error:
        failure = Failure(
            type(error).__name__,
            str(error),
            *_places(error.__traceback__),
            time.monotonic(),
            traceback.format_exc(),
        )
        return bytes(ByValue.dumps(failure))
