"""Progress of long work: a live display on a terminal, few plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from shardwise import terminal
from shardwise.config.redact import redact
from shardwise.metrics.declared import EVERY, Metric, Table


def number(value: float) -> str:
    """A figure of at most five characters: 950, 1.2k, 3.4M, 5.6G."""
    if abs(value) >= 1e15:
        return f"{value:.1e}"
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale * 0.9995:
            scaled = value / scale
            return f"{scaled:.0f}{letter}" if abs(scaled) >= 99.95 else f"{scaled:.1f}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as people write them: 45 s, 3:05, 2:03:04, 3 d 4 h."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def written(metric: Metric, value: float) -> str:
    """A figure as its declaration wants it."""
    return number(value) if metric.format == "short" else format(value, metric.format)


def describe(values: Mapping[str, Any], declared: Mapping[str, Metric] = EVERY) -> str:
    """The metrics worth a line: "loss 2.31  grad 0.8  tok/s 5.8k"."""
    shown = [
        f"{m.line} {written(m, value)}"
        for m in declared.values()
        if m.line and isinstance(value := values.get(m.name), (int, float))
    ]
    return "  ".join(shown)


class Progress:
    """Shows stages and steps on rank 0; other ranks stay silent.

    On a terminal, one live bar a stage. Elsewhere a line at most every ``interval_s`` seconds,
    and always the last step of a stage. The time left is of this stage, from the mean pace of
    the steps seen in this process (so a resumed run is not judged by steps it did not run).
    Usable as a context manager; nothing is drawn until the first update.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, int]],
        *,
        declared: Table | None = None,
        rank: int = 0,
        stream: IO[str] | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``declared``: what each stage says of its metrics; default: what every stage has."""
        self._steps = dict(stages)
        self._declared = declared or {}
        self._enabled = rank == 0
        self._stream = stream if stream is not None else sys.stderr
        self._interval = interval_s
        self._clock = clock
        self._console = Console(file=self._stream, highlight=False)
        self._live: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, tuple[int, float]] = {}
        self._last_line = -float("inf")

    def update(self, stage: str, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Step ``step`` (counted from 1) of ``stage`` is done.

        A stage that was not announced may report too; its number of steps is then unknown.
        """
        if not self._enabled:
            return
        now = self._clock()
        self._first.setdefault(stage, (step, now))
        text = describe(metrics or {}, self._declared.get(stage, EVERY))
        left = self._left(stage, step, now)
        if self._console.is_terminal:
            self._draw(stage, step, text, left)
            return
        done = step >= self._steps.get(stage, step + 1)
        if done or now - self._last_line >= self._interval:
            self._last_line = now
            total = self._steps.get(stage, "?")
            parts = [f"{stage} {step}/{total}", text, f"left {left}" if left and not done else ""]
            self._print("  ".join(p for p in parts if p))

    def announce(self, stage: str, total: int) -> None:
        """A stage has ``total`` steps, which was not known before."""
        self._steps[stage] = total

    def message(self, text: str) -> None:
        """A line of its own, above the bars."""
        if self._enabled:
            self._print(text)

    def close(self) -> None:
        """Take the live display down, leaving its last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _left(self, stage: str, step: int, now: float) -> str:
        first_step, first_time = self._first[stage]
        if step <= first_step or stage not in self._steps:
            return ""
        pace = (now - first_time) / (step - first_step)
        return duration(pace * max(self._steps[stage] - step, 0))

    def _draw(self, stage: str, step: int, text: str, left: str) -> None:
        if self._live is None:
            self._live = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.fields[of]}"),
                TextColumn("{task.fields[text]}", markup=False),
                TextColumn("[dim]{task.fields[left]}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._live.start()
        total = self._steps.get(stage)
        if stage not in self._tasks:
            self._tasks[stage] = self._live.add_task(
                stage, total=total, text="", left="", of=total if total else "?"
            )
        note = f"left {left}" if left and step < (total or step + 1) else ""
        self._live.update(self._tasks[stage], completed=step, text=text, left=note)

    def _print(self, text: str) -> None:
        if self._live is not None:
            shown = terminal.printable(redact(text))
            self._live.console.print(shown, markup=False, highlight=False)
        else:
            terminal.say(text, self._stream, secrets=True)
