"""What trials are compared by: which metric of which stage, and what a trial reached."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Literal

from shardwise.config.explain import nearest
from shardwise.config.run import RunConfig
from shardwise.errors import ConfigError
from shardwise.metrics import declared
from shardwise.metrics.declared import Metric
from shardwise.metrics.writers import METRICS_FILE
from shardwise.report.rundata import RunData
from shardwise.report.series import Series
from shardwise.sweep.config import ObjectiveConfig

Curve = list[tuple[int, float]]  # (step, value), finite ones


@dataclasses.dataclass(frozen=True)
class Objective:
    """A declared metric of a stage; ``sign``: 1 where lower is better, else -1."""

    stage: str
    metric: Metric
    better: Literal["lower", "higher"]
    take: Literal["last", "best"] = "last"

    @property
    def sign(self) -> int:
        """To multiply values with, so that less is better."""
        return 1 if self.better == "lower" else -1

    def series(self, run: RunData) -> Series:
        """The curve of a run."""
        return run.get(self.stage, self.metric.name)

    def reached(self, run: RunData) -> float | None:
        """What a run has reached so far."""
        values = self.series(run).values
        if not len(values):
            return None
        return float(values[-1] if self.take == "last" else self.sign * min(self.sign * values))

    def __str__(self) -> str:
        return f"{self.take} {self.metric.name} of {self.stage}, {self.better} is better"


def objective_of(config: ObjectiveConfig, run: RunConfig) -> Objective:
    """The objective of a sweep over ``run``. Raises ConfigError with the nearest name."""
    data = run.model_dump(mode="json")
    names = [stage.name for stage in run.stages]
    stage = config.stage or names[-1]
    if stage not in names:
        raise ConfigError(
            f"objective.stage: there is no {stage!r}{nearest(stage, names) or ';'} "
            f"stages: {', '.join(names)}"
        )
    table = declared.of(data)[stage]
    if config.metric is None:
        metric = declared.best_of(data, stage)
        if metric is None:
            raise ConfigError(
                f"objective.metric: stage {stage} does not say which metric is best; name one of "
                f"{', '.join(table)}"
            )
    elif config.metric in table:
        metric = table[config.metric]
    else:
        raise ConfigError(
            f"objective.metric: stage {stage} declares no {config.metric!r}"
            f"{nearest(config.metric, table) or ';'} it has {', '.join(table)}"
        )
    better = config.better or metric.better
    if better is None:
        raise ConfigError(
            f"objective.better: {metric.name} is neither better lower nor higher by itself; say "
            "lower or higher"
        )
    return Objective(stage, metric, better, config.take)


class Tail:
    """A metric of a run's metrics.jsonl, read on from where the last look ended."""

    def __init__(self, folder: Path, stage: str, metric: str) -> None:
        self.path = folder / METRICS_FILE
        self.stage, self.metric = stage, metric
        self.curve: Curve = []
        self._file = (-1, -1)  # device and inode
        self._offset = 0

    def read(self) -> Curve:
        """All values so far. A resumed run writes the file anew, without the steps to come."""
        try:
            with self.path.open("rb") as stream:
                found = os.fstat(stream.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset:
                    self._file, self._offset, self.curve = (found.st_dev, found.st_ino), 0, []
                stream.seek(self._offset)
                text = stream.read()
        except FileNotFoundError:
            return self.curve
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._take(line)
        return self.curve

    def _take(self, line: bytes) -> None:
        if self.metric.encode() not in line:
            return
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict) or record.get("stage") != self.stage:
            return
        step, value = record.get("step"), record.get(self.metric)
        if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value):
            self.curve.append((step, float(value)))
