"""What a run would log, noted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shardwise.config.schema import StageConfig
from shardwise.metrics.declared import by_name
from shardwise.metrics.writers import Kind, MetricsLogger
from shardwise.verify.notes import Notes


class WatchedLogger(MetricsLogger):
    """Notes what a run would write, and writes nothing. Only rank 0's writes count."""

    def __init__(self, notes: Notes, stage: StageConfig) -> None:
        super().__init__(Path(), rank=1)
        self.notes = notes
        self.of_machine = {m.name for m in by_name(stage.metrics()).values() if m.of_machine}

    def log(
        self,
        stage: str,
        step: int,
        metrics: Mapping[str, Any],
        kind: Kind = "train",
        *,
        force: bool = False,
    ) -> None:
        """See `MetricsLogger`."""
        if dist.get_rank() != 0:
            return
        if kind == "event":
            what = f"step {step} {metrics['event']}"
            self.notes.note("event", f"{what} time {self.notes.count(f'event {what}')}", 1.0)
            return
        for name, value in metrics.items():
            timed = name in self.of_machine or (kind == "eval" and name.endswith("_seconds"))
            if not timed and isinstance(value, (int, float)):
                shown = value if math.isfinite(value) else 0.0
                sort = "sentinel" if name.startswith("fp8") else "logged"
                what = f"step {step} {kind} {name}"
                if kind == "eval":  # two evaluations of a kind call their figures alike
                    sort, what = "evaluation", f"{what} time {self.notes.count(what)}"
                self.notes.note(sort, what, shown)

    def event(self, stage: str, step: int, event: str, message: str, **fields: Any) -> None:
        """See `MetricsLogger`."""
        if event != "fp8":  # words on figures of the sentinel, which are compared themselves
            self.log(stage, step, {"event": event}, "event")
