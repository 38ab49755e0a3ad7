"""What happens around the steps of a stage: the loop calls, and each of these does one thing.

Metrics, progress, guards and what a recipe's ``callbacks`` name are such objects; the loop knows
none of them. It saves by itself: a save and the point at which a run may be cut are one matter
(`resilience.gate`), and no listener may come in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from shardwise.config.callbacks import StopWhenConfig
from shardwise.errors import DivergedError
from shardwise.metrics.declared import by_name
from shardwise.metrics.meters import Throughput, memory_metrics
from shardwise.metrics.progress import Progress

if TYPE_CHECKING:
    from shardwise.stages.base import StageContext

Metrics = Mapping[str, float]
# Updates in a row whose gradients were not finite before the run gives up.
MAX_SKIPPED = 10


class Loop(Protocol):
    """What a callback is given of the loop (`stages.loop.Loop`).

    ``elapsed``: seconds of the newest step; ``steady``: whether they tell of the speed (not of
    the compiler, or the profiler).
    """

    ctx: StageContext
    config: Any  # of the stage
    elapsed: float
    steady: bool

    def tell(self, done: int, kind: str, text: str) -> None:
        """Let every callback, and the log, hear of something."""
        ...

    def last_good(self) -> str:
        """Which checkpoint a run that breaks can go on from, in words."""
        ...


class Callback:
    """Hooks of a stage's loop, in the order in which they come; each is a collective moment.

    Every rank calls them, with the same numbers but those of its own machine, in the order of the
    list. What one raises ends the run on that rank, so all must decide alike. ``done``: complete
    steps, from 1 on. A resumed run calls them for its own steps alone.
    """

    def start(self, loop: Loop, done: int) -> None:
        """The stage begins, or goes on behind ``done`` steps."""

    def before_step(self, loop: Loop, step: int) -> None:
        """Step ``step`` (from 0) begins."""

    def after_step(self, loop: Loop, done: int, metrics: dict[str, float]) -> None:
        """A step is complete. What is put into ``metrics`` is seen by those behind in the list."""

    def after_validation(self, loop: Loop, done: int, found: Metrics, metrics: Metrics) -> None:
        """What was ``found`` on held-out data, beside the ``metrics`` of the step."""

    def after_checkpoint(self, loop: Loop, done: int) -> None:
        """The stage's state is saved, or given to the thread that saves it."""

    def event(self, loop: Loop, done: int, kind: str, text: str) -> None:
        """Something that a step, an engine or another callback has to tell."""

    def error(self, loop: Loop, error: BaseException) -> None:
        """The run ends with an error; nothing may be raised here, or be waited for."""

    def end(self, loop: Loop) -> None:
        """The last step is complete and saved."""


class Meters(Callback):
    """Speed over all steady steps, memory, and the time of a step."""

    def __init__(self, meter: Throughput) -> None:
        self.meter = meter

    def after_step(self, loop: Loop, done: int, metrics: dict[str, float]) -> None:
        """See `Callback`. The first step of a process compiles, a traced one is watched."""
        if loop.steady:
            metrics |= self.meter.update(int(metrics.get("tokens", 0)), loop.elapsed)
        metrics |= memory_metrics(loop.ctx.device) | {"step_seconds": loop.elapsed}


class Figures(Callback):
    """The newest values that the end of a stage is told by, besides its evaluations."""

    def __init__(self, ctx: StageContext) -> None:
        self.told = [m.name for m in by_name(ctx.stage.metrics()).values() if m.figure]
        self.values: dict[str, float] = {}

    def after_step(self, loop: Loop, done: int, metrics: dict[str, float]) -> None:
        """See `Callback`."""
        self._keep(metrics)

    def after_validation(self, loop: Loop, done: int, found: Metrics, metrics: Metrics) -> None:
        """See `Callback`."""
        self._keep(found)

    def _keep(self, found: Metrics) -> None:
        self.values |= {k: found[k] for k in self.told if math.isfinite(found.get(k, math.nan))}


class Log(Callback):
    """metrics.jsonl, and whom the recipe's ``logging`` names."""

    def after_step(self, loop: Loop, done: int, metrics: dict[str, float]) -> None:
        """See `Callback`."""
        name, last = loop.config.name, done == loop.config.steps
        loop.ctx.logger.log(name, done, metrics, force=last)

    def after_validation(self, loop: Loop, done: int, found: Metrics, metrics: Metrics) -> None:
        """See `Callback`."""
        loop.ctx.logger.log(loop.config.name, done, found, "validation")

    def event(self, loop: Loop, done: int, kind: str, text: str) -> None:
        """See `Callback`."""
        loop.ctx.logger.event(loop.config.name, done, kind, text)


class Show(Callback):
    """Lines, or a bar, of progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def after_step(self, loop: Loop, done: int, metrics: dict[str, float]) -> None:
        """See `Callback`."""
        self.progress.update(loop.config.name, done, metrics)

    def after_validation(self, loop: Loop, done: int, found: Metrics, metrics: Metrics) -> None:
        """See `Callback`."""
        self.progress.update(loop.config.name, done, {**metrics, **found})

    def event(self, loop: Loop, done: int, kind: str, text: str) -> None:
        """See `Callback`."""
        if kind != "skipped":  # each step's line shows its gradient
            self.progress.message(f"step {done}: {text}")


class SkipGuard(Callback):
    """Ends a run whose updates are skipped one after the other."""

    def __init__(self) -> None:
        self.skipped = 0

    def after_step(self, loop: Loop, done: int, metrics: dict[str, float]) -> None:
        """See `Callback`. Raises DivergedError."""
        if math.isfinite(metrics.get("grad_norm", 0.0)):
            self.skipped = 0
            return
        self.skipped += 1
        loop.tell(done, "skipped", "non-finite gradients; weights kept")
        if self.skipped >= MAX_SKIPPED:
            raise DivergedError(
                f"stage {loop.config.name}: {MAX_SKIPPED} updates in a row had non-finite "
                f"gradients (last step {done}); lower optimizer.lr, or look at the samples of "
                f"these steps; {loop.last_good()}"
            )


class StopWhen(Callback):
    """See `StopWhenConfig`."""

    def __init__(self, config: StopWhenConfig) -> None:
        self.config = config
        self.beyond = 0

    def after_step(self, loop: Loop, done: int, metrics: dict[str, float]) -> None:
        """See `Callback`. Raises DivergedError."""
        self._look(loop, done, metrics)

    def after_validation(self, loop: Loop, done: int, found: Metrics, metrics: Metrics) -> None:
        """See `Callback`. Raises DivergedError."""
        self._look(loop, done, found)

    def _look(self, loop: Loop, done: int, found: Metrics) -> None:
        config = self.config
        value = found.get(config.metric)
        if value is None:
            return
        high = config.above is not None and not value <= config.above  # NaN is beyond, too
        low = config.below is not None and not value >= config.below
        self.beyond = self.beyond + 1 if high or low else 0
        if self.beyond >= config.patience:
            side = f"above {config.above:g}" if high else f"below {config.below:g}"
            times = f", {config.patience} times in a row" if config.patience > 1 else ""
            raise DivergedError(
                f"stage {loop.config.name}: {config.metric} is {value:.4g} at step {done}, {side}"
                f"{times}, as callbacks.{config.name} forbids; {loop.last_good()}"
            )
