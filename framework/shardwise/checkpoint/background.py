"""Saving behind the training loop."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.checkpoint.manifest import NonFiniteError, PeerLostError
from shardwise.checkpoint.ranks import Ranks
from shardwise.checkpoint.saving import Part, Planner, Request, write
from shardwise.checkpoint.writer import Writer
from shardwise.errors import CheckpointError
from shardwise.ops.regions import Region

log = logging.getLogger(__name__)


class AsyncSaver:
    """Saves behind the training loop: copies to host memory, then writes in a thread.

    At most one save is in flight; the next one waits for it. What goes wrong in the thread is
    logged at once. It does not keep the next save from starting; after the last one, `wait` and
    `close` raise it. Making the object is a collective call: the thread
    communicates over a group of its own.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        keep: int | None = None,
        lower_is_better: bool = True,
        group: dist.ProcessGroup | None = None,
        writer: Writer | None = None,
    ) -> None:
        """``group``: a gloo group that nothing else uses; by default one over all ranks."""
        self.root = Path(root)
        self.keep = keep
        self.lower_is_better = lower_is_better
        self._ranks = Ranks.of(group, background=True)
        self.writer = writer or Writer()
        self._planner = Planner()
        self._host: dict[tuple[str, Region], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._step = -1
        self._error: BaseException | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
        *,
        protect: Collection[int] = (),
        metric: float | None = None,
        nonfinite: Collection[str] = (),
    ) -> None:
        """Start a save as `save` does; returns when the tensors may change again.

        Raises CheckpointError if this one cannot start. If the one before failed, this one takes
        its place, unless no later one can be better: NonFiniteError and PeerLostError are raised.
        """
        try:
            self.wait()
        except (NonFiniteError, PeerLostError):
            raise
        except Exception as error:
            log.error("step %d is saved in place of one that failed: %s", step, error)
        request = Request(
            self.root, step, meta, dict(files or {}), self.keep, tuple(protect),
            None if metric is None else float(metric),
            self.lower_is_better, tuple(nonfinite),
        )  # fmt: skip
        parts = self._planner.parts(self._ranks, request, tensors)
        # meta may change while the thread writes; a round trip through JSON is a deep copy
        request = dataclasses.replace(request, meta=json.loads(json.dumps(meta)))
        with self._ranks.together():
            parts = self._snapshot(parts)
        self._step = step
        self._thread = threading.Thread(
            target=self._run, args=(request, parts), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is in flight. Raises what the save in flight raised."""
        if self._thread is not None:
            started = time.monotonic()
            if self._thread.is_alive():
                log.info("waiting for the checkpoint of step %d to be durable", self._step)
            self._thread.join()
            self._thread = None
            waited = time.monotonic() - started
            if waited > 1:
                log.warning("waited %.1f s for the checkpoint of step %d", waited, self._step)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """`wait`, and give the host memory back."""
        try:
            self.wait()
        finally:
            self._host.clear()

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CheckpointError as own:  # already logged; must not hide the error under way
            error.add_note(f"the checkpoint of step {self._step} failed too: {own}")

    def _snapshot(self, parts: list[Part]) -> list[Part]:
        """Copies in host memory, which is kept from save to save."""
        host: dict[tuple[str, Region], Tensor] = {}
        copies = []
        for part in parts:
            slot = (part.name, part.region)
            on_gpu = part.values.is_cuda
            copy = self._host.get(slot)
            if copy is None or copy.dtype != part.values.dtype:
                copy = torch.empty(part.values.shape, dtype=part.values.dtype, pin_memory=on_gpu)
            copy.copy_(part.values, non_blocking=on_gpu)
            host[slot] = copy
            copies.append(dataclasses.replace(part, values=copy))
        if any(part.values.is_cuda for part in parts):
            torch.cuda.synchronize()
        self._host = host
        return copies

    def _run(self, request: Request, parts: list[Part]) -> None:
        try:
            write(self._ranks, self.writer, request, parts, self._planner.table)
        except BaseException as error:
            log.error("the checkpoint of step %d was not saved: %s", request.step, error)
            self._error = error
