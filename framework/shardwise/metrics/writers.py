"""`MetricsLogger`: metrics.jsonl always, TensorBoard and W&B when the config asks for them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from shardwise.config.redact import redact_data
from shardwise.config.schema import LoggingConfig
from shardwise.metrics import tensorboard, wandb
from shardwise.metrics.jsonl import JsonLines, plain

log = logging.getLogger(__name__)

Kind = Literal["train", "validation", "eval", "event"]

METRICS_FILE = "metrics.jsonl"
NOTES_FILE = "notes.jsonl"
LEFT_OUT = "left_out"  # a note: rows of a stage's files that it does not learn from
_RESERVED = frozenset({"time", "stage", "step", "kind"})


class Listener(Protocol):
    """Someone else who is told the scalars."""

    def log(self, stage: str, step: int, kind: str, scalars: Mapping[str, float]) -> None:
        """Take the finite numbers of one line."""

    def rewind(self, stage: str, step: int) -> None:
        """Steps of ``stage`` after ``step`` will come again."""

    def close(self) -> None:
        """The run is over."""


def check_listeners(config: LoggingConfig) -> None:
    """Raise ConfigError when the config asks for a library that is not installed.

    To be called with the other checks, before anything is started.
    """
    if config.tensorboard:
        tensorboard.require()
    if config.wandb != "off":
        wandb.require()


class MetricsLogger:
    """Writes a run's metrics; on ranks other than 0 it does nothing.

    metrics.jsonl holds what the computation did: after `rewind` to the step of the checkpoint
    that a run resumes from, and the same steps again, the file equals that of a run that was
    never interrupted, apart from times. What happened to the *processes* (started, resumed,
    fell back to an older checkpoint) goes to notes.jsonl, which is never rewritten.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig | None = None,
        run_name: str = "run",
        resolved_config: Mapping[str, Any] | None = None,
        *,
        rank: int = 0,
    ) -> None:
        self.enabled = rank == 0
        self._listeners: list[Listener] = []
        if not self.enabled:
            return
        config = config or LoggingConfig()
        check_listeners(config)
        self._every = config.every
        self._metrics = JsonLines(Path(run_dir) / METRICS_FILE)
        self._notes = JsonLines(Path(run_dir) / NOTES_FILE)
        for file in (self._metrics, self._notes):
            if file.damaged:
                self.note("damaged", file.damaged)
        if config.tensorboard:
            self._listeners.append(tensorboard.TensorboardListener(run_dir / "tensorboard"))
        if config.wandb != "off":
            safe = redact_data(plain(resolved_config or {}))
            self._listeners.append(
                wandb.WandbListener(run_dir, config.wandb, config.wandb_project, run_name, safe)
            )

    def log(
        self,
        stage: str,
        step: int,
        metrics: Mapping[str, Any],
        kind: Kind = "train",
        *,
        force: bool = False,
    ) -> None:
        """Write one line: flat metric names to numbers, texts, null, or lists of them.

        Numbers may be Python's, numpy's or one-element tensors. NaN and infinities become null
        beside ``<name>_nonfinite``. Of kind ``train`` only every ``logging.every``-th step is
        written, unless ``force`` (a stage's last step). Raises ValueError for the names time,
        stage, step and kind.
        """
        if not self.enabled or (kind == "train" and step % self._every and not force):
            return
        if clash := _RESERVED & metrics.keys():
            raise ValueError(f"metrics may not be named {', '.join(sorted(clash))}")
        values = redact_data(plain(metrics))
        head = {"time": round(time.time(), 3), "stage": stage, "step": step, "kind": kind}
        self._metrics.append({**head, **values})
        scalars = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        self._tell(lambda listener: listener.log(stage, step, kind, scalars))

    def _tell(self, act: Callable[[Listener], None]) -> None:
        """Tell every listener; one that fails is told no more, and that is noted."""
        for listener in list(self._listeners):
            try:
                act(listener)
            except Exception as error:
                self._listeners.remove(listener)
                words = f"{type(listener).__name__} fails and is told no more: {error}"
                log.warning("%s", words)
                self.note("listener_failed", words)

    def event(self, stage: str, step: int, event: str, message: str, **fields: Any) -> None:
        """Something the computation did at a step, the same in every rerun: a skipped step."""
        self.log(stage, step, {"event": event, "message": message, **fields}, kind="event")

    def note(self, event: str, message: str, stage: str = "", step: int = 0, **fields: Any) -> None:
        """Something that happened to the processes: a start, a resume, a fallback."""
        if self.enabled:
            head = {"time": round(time.time(), 3), "stage": stage, "step": step, "kind": "event"}
            body = redact_data(plain({"event": event, "message": message, **fields}))
            self._notes.append({**head, **body})

    def rewind(self, stage: str, step: int) -> int:
        """Drop the lines of ``stage`` after ``step`` (-1: all of it); returns how many.

        Those of its evaluations go too: a stage that goes on is evaluated again. To be called
        once a stage knows which step it starts after.
        """
        if not self.enabled:
            return 0
        last = 0

        def wanted(record: dict[str, Any]) -> bool:
            nonlocal last
            now = record.get("step", 0)
            if record.get("stage") != stage or not isinstance(now, int):
                return True
            if now <= step and record.get("kind") == "train":
                last = max(last, now)
            return now <= step and record.get("kind") != "eval"

        dropped = self._metrics.keep(wanted)
        if dropped:
            self._tell(lambda listener: listener.rewind(stage, step))
        if last < step - step % self._every:
            words = f"{METRICS_FILE} holds nothing of steps {last + 1} to {step}"
            log.warning("stage %s: %s", stage, words)
            self.note("metrics_lost", words, stage, step)
        return dropped

    def sync(self) -> None:
        """Make the lines durable; to be called before a checkpoint commits."""
        if self.enabled:
            self._metrics.sync()
            self._notes.sync()

    def close(self) -> None:
        """Close all files and listeners."""
        if not self.enabled:
            return
        self._tell(lambda listener: listener.close())
        try:
            self._metrics.close()
        finally:
            self._notes.close()
