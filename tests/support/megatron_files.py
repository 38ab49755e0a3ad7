"""Megatron's writing of checkpoints, without the processes that it does it in."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from typing import Any


def _in_this_process(
    transforms: Any, storage: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]
) -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    found: queue.Queue[Any] = queue.Queue()
    for number, bucket in enumerate(buckets):
        running: queue.Queue[Any] = queue.Queue()
        running.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, found, running, use_fsync=False
        )
    results.put(dict(found.get() for _ in buckets))


@contextlib.contextmanager
def written_here() -> Iterator[None]:
    """Within, `dist_checkpointing.save` writes what it writes in this process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer: Any = filesystem_async.FileSystemWriterAsync
    kept = writer.write_preloaded_data_multiproc
    filesystem_async._results_queue = queue.Queue()
    writer.write_preloaded_data_multiproc = staticmethod(_in_this_process)
    try:
        yield
    finally:
        filesystem_async._results_queue = None
        writer.write_preloaded_data_multiproc = staticmethod(kept)
