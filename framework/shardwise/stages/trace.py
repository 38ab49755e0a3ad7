"""One step, looked at closely: a profile of every rank, and what it said to whom."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from shardwise.metrics.progress import Progress
from shardwise.ops import comm
from shardwise.stages.base import StageContext

TRACED_STEP = 2  # compiled, with its memory allocated


@contextlib.contextmanager
def trace_step(ctx: StageContext, progress: Progress) -> Iterator[None]:
    """Profile what happens inside, on every rank.

    Writes ``trace/<stage>.rank_<r>.json`` (Chrome's trace format: chrome://tracing, Perfetto) and
    ``trace/<stage>.rank_<r>.communication.json``: rows of axis, operation, calls and bytes.
    """
    folder = ctx.directory / "trace"
    folder.mkdir(parents=True, exist_ok=True)
    rank, name = dist.get_rank(), ctx.stage.name
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler, comm.tally() as tally:
        yield
    profiler.export_chrome_trace(str(folder / f"{name}.rank_{rank}.json"))
    (folder / f"{name}.rank_{rank}.communication.json").write_text(
        json.dumps({"layout": str(ctx.layout), "rank": rank, "rows": tally.rows()}, indent=1)
    )
    parts = [
        f"{r['axis']} {r['operation']} {r['calls']} x, {r['bytes'] / 1e6:.2f} MB"
        for r in tally.rows()
    ]
    progress.message(f"{name}: rank 0 of {ctx.layout} sent in one step: " + "; ".join(parts))
