"""Runs that are told to stop in a chosen place."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

from shardwise.checkpoint.writer import Writer
from shardwise.errors import Stopped
from shardwise.resilience import ending
from shardwise.resilience.gate import Gate
from shardwise.stages import pipeline
from shardwise.stages.loop import Loop
from shardwise.stages.pretrain import PretrainStage
from shardwise.stages.rollout_worker import RolloutWorker
from tests.stages.recipes import run

# Where the signal finds the main thread: a function, and at which of its calls.
PLACES: dict[str, tuple[Any, str]] = {
    "step": (Loop, "_train_step"),
    "validation": (PretrainStage, "validate"),
    "save": (Writer, "rename"),
    "rollout": (RolloutWorker, "rollout"),
    "evaluation": (pipeline, "evaluate_all"),
}


@contextlib.contextmanager
def signalled(place: str, call: int, number: int, hangs: bool) -> Iterator[None]:
    """Send the last rank a signal in a call of ``place``; ``hangs``: which then never returns.

    What hangs is not waited for through half of the grace period.
    """
    signal.signal(number, signal.SIG_DFL)  # also where whoever runs this ignores it
    owner, name = PLACES[place]
    original: Callable[..., Any] = getattr(owner, name)
    calls, ended, left = [0], threading.Event(), []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            if dist.get_rank() == (0 if place == "save" else dist.get_world_size() - 1):
                os.kill(os.getpid(), number)
            if hangs:
                assert ended.wait(60)
                raise left[0]
        return original(*args, **kwargs)

    def leave(error: Stopped) -> None:
        if dist.get_world_size() > 1:
            original_leave(error)
        left.append(error)
        ended.set()

    original_leave = ending.leave

    reached = Gate.reached
    short = mock.patch.object(Gate, "reached", lambda *a: reached(*a[:2], min(a[2], 0.3)))
    with (
        mock.patch.object(owner, name, called),
        mock.patch.object(ending, "leave", leave),
        short if hangs else contextlib.nullcontext(),
    ):
        yield


def run_signalled(
    _: str, config: dict[str, Any], place: str, call: int, number: int, hangs: bool
) -> None:
    """The run of a config with a signal in it."""
    with signalled(place, call, number, hangs):
        run(config, "resilience.grace_s=60.0")
        raise AssertionError("it did not stop")
