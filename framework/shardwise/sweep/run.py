"""Trials in slots, until none is left, the budget is spent, or a signal comes."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from shardwise import terminal
from shardwise.errors import ExitCode, ShardwiseError, Stopped, UserError
from shardwise.launch.local import SPARE_SECONDS
from shardwise.metrics.progress import duration
from shardwise.resilience.ending import write_ending
from shardwise.resilience.stop import SIGNALS, heeded
from shardwise.storage.durable import write_durably
from shardwise.sweep import asking, pruner
from shardwise.sweep.config import OptunaConfig, Point
from shardwise.sweep.objective import Tail
from shardwise.sweep.page import render
from shardwise.sweep.plan import Plan, reason_of
from shardwise.sweep.process import Running, command_of
from shardwise.sweep.results import Reader, Result, best, remaining, rows
from shardwise.sweep.slots import Slot
from shardwise.sweep.table import PAGE_FILE, shown, table_of, write_tables
from shardwise.sweep.trial import TRIALS, Trial, name_of

POLL_SECONDS = 0.25
WATCH_SECONDS = 2.0  # between looks at the curves of running trials
PUBLISH_SECONDS = 60.0  # between pages while nothing ends


class NothingDone(ShardwiseError):  # noqa: N818 (a result, not an accident)
    """No trial of a sweep has a value; the message says where the reasons are."""


def publish(
    plan: Plan, results: Sequence[Result], over: bool, left: float | None = None
) -> dict[str, Any]:
    """Write the tables and the page of a sweep as it stands; returns the table.

    ``over``: no trial runs. ``left``: seconds, as far as is known.
    """
    table = table_of(plan, results, left)
    write_tables(plan, table)
    page = render(plan, results, over, left)
    write_durably(plan.directory / PAGE_FILE, page.encode("utf-8", "replace"))
    return table


class Sweep:
    """Trials of a plan in their slots."""

    def __init__(
        self, plan: Plan, places: Sequence[Slot], say: Callable[[str], None] | None = None
    ) -> None:
        self.plan, self.config, self.objective = plan, plan.config, plan.objective
        self.free = list(places)
        self.num_slots = len(places)
        self.running: dict[str, Running] = {}
        self.reader = Reader(plan.objective)
        self.received: list[int] = []
        self.attempted: set[str] = set()  # here; none is started twice by one command
        self.exhausted = False
        self.say = say or (lambda text: terminal.say(text, sys.stderr, secrets=True))
        self._tails: dict[str, Tail] = {}
        self._watched = self._published = 0.0

    # --- the loop -------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Until no trial is left to run; see `sweep`."""
        with _signals(self.received):
            try:
                while True:
                    ended = self._collect()
                    if self.received:
                        self._stop()
                        break
                    while self.free and (trial := self._next()) is not None:
                        self._start(trial)
                    if not self.running:
                        break
                    self._watch()
                    if ended or time.monotonic() > self._published + PUBLISH_SECONDS:
                        self.publish()
                    time.sleep(POLL_SECONDS)
            finally:
                for one in self.running.values():
                    one.kill()
        return self._conclude()

    def _conclude(self) -> dict[str, Any]:
        found = self.publish(over=not self.received)
        if self.received:
            name = signal.Signals(self.received[0]).name
            raise Stopped(
                f"stopped by {name}: {len(self._left())} trials are left; run the same command "
                "again to go on",
                ExitCode.REQUEUE,
            )
        unfinished = [t.name for t in self._left() if t.name in self.attempted]
        if unfinished:
            raise Stopped(
                f"trials {', '.join(unfinished)} were stopped by somebody else and have saved; run "
                "the same command again to go on",
                ExitCode.REQUEUE,
            )
        if (blind := self._unlogged()) is not None:
            logged = blind.run.names(self.objective.stage) if blind.run else []
            raise NothingDone(
                f"trial {blind.name} is done, and its stage {self.objective.stage} has logged no "
                f"{self.objective.metric.name}, but {', '.join(logged)}; say another objective "
                "(val_ metrics need data.validation), then the same command goes on"
            )
        if best(rows(self.results(), self.objective)) is None:
            raise NothingDone(
                f"no trial has a value of {self.objective.metric.name}; {self.plan.directory}"
                "/table.md has the reasons"
            )
        return found

    def results(self) -> list[Result]:
        """All trials as they stand."""
        return self.reader.read(self.plan, list(self.running))

    def publish(self, over: bool = False) -> dict[str, Any]:
        """Write the tables and the page."""
        left = None if over else self.left()
        self._published = time.monotonic()
        return publish(self.plan, self.results(), over, left)

    def left(self) -> float | None:
        """Seconds that are left, as far as is known."""
        had = {n: one.seconds for n, one in self.running.items()}
        coming = len(self._left()) - len(self.running)
        if isinstance(self.config.method, OptunaConfig) and not self.exhausted:
            points = self.config.method.trials - len(self.plan.numbers())
            coming += max(points, 0) * self.config.repeats
        if (most := self.config.budget.trials) is not None:
            coming = min(coming, most - self._num_started())
        steps = sum(stage.steps for stage in self.plan.base.config.training)
        return remaining(self.results(), had, self.num_slots, steps, max(coming, 0))

    # --- which is next --------------------------------------------------------------------------

    def _left(self) -> list[Trial]:
        """Trials that are not over: those that run, too."""
        return [trial for trial in self.plan.trials if trial.status()[0] == "open"]

    def _next(self) -> Trial | None:
        if self._spent():
            return None
        pruned = {t.number for t in self.plan.trials if t.status()[0] == "pruned"}
        waiting = [
            trial
            for trial in self._left()
            if trial.name not in self.attempted and trial.number not in pruned
        ]
        if waiting:
            # What was begun first, then every point once before any of them again.
            return min(waiting, key=lambda t: (not t.begun, t.order))
        return self._asked()

    def _asked(self) -> Trial | None:
        """The trial that a sampler says is next."""
        method = self.config.method
        while isinstance(method, OptunaConfig) and not self.exhausted:
            number = max(self.plan.numbers(), default=-1) + 1
            if number >= method.trials:
                return None
            point = asking.ask(self.config, self._told(), self.objective.better)
            if point is None:
                self.exhausted = True
                self.say("there is hardly a point that was not tried; the search is over")
                return None
            try:
                several = [self.plan.trial(number, r, point) for r in range(self.config.repeats)]
            except UserError as error:
                self._keep_impossible(number, point, reason_of(self.plan, point, error))
                continue
            self.plan.trials += several
            return several[0]
        return None

    def _keep_impossible(self, number: int, point: Point, reason: str) -> None:
        """A drawn point that cannot run is a failed trial, of which the sampler is told."""
        name = name_of(number, 0)
        folder = self.plan.directory / TRIALS / name
        overrides = self.plan.overrides_of(number, 0, point)
        trial = Trial(folder, number, 0, point, overrides, 1)
        trial.write()
        write_ending(folder, ExitCode.USAGE, reason)
        self.plan.trials.append(trial)
        self.say(f"{name} cannot run: {reason}")

    def _told(self) -> list[asking.Told]:
        """What the sampler is told, by number: from the folders alone."""
        found = []
        for row in sorted(rows(self.results(), self.objective), key=lambda row: row.number):
            first = row.results[0]
            state = first.state if first.state in ("done", "pruned", "failed") else "running"
            value = row.value if state == "done" else None
            found.append(asking.Told(row.point, state, value, first.curve))  # type: ignore[arg-type]
        return found

    def _unlogged(self) -> Result | None:
        """A trial that has ended without a value, as all others will: there is no use in them."""
        done = [result for result in self.results() if result.state == "done"]
        return done[0] if done and all(result.value is None for result in done) else None

    def _num_started(self) -> int:
        return sum(trial.begun for trial in self.plan.trials)

    def _spent(self) -> bool:
        """Whether the budget lets no more trial start."""
        budget = self.config.budget
        if self._unlogged() is not None:
            return True
        if budget.trials is not None and self._num_started() >= budget.trials:
            return not any(t.begun and t.name not in self.attempted for t in self._left())
        if budget.failures is not None:
            failed = sum(t.status()[0] == "failed" for t in self.plan.trials)
            if failed >= budget.failures:
                return True
        if budget.hours is None:
            return False
        had = sum(result.seconds or 0.0 for result in self.results())
        had += sum(one.seconds for one in self.running.values())
        return had >= 3600 * budget.hours

    # --- what runs ------------------------------------------------------------------------------

    def _start(self, trial: Trial) -> None:
        slot = self.free.pop(0)
        if not trial.begun:
            trial.write()
        self.attempted.add(trial.name)
        self.running[trial.name] = Running(trial, slot, command_of(self.config.recipe, trial))

    def _collect(self) -> bool:
        """Take leave of what has ended; whether anything has."""
        ended = False
        for name, one in list(self.running.items()):
            if one.poll() is None:
                continue
            ended = True
            del self.running[name]
            self.free = sorted([*self.free, one.slot], key=lambda slot: slot.number)
            self._tell(one)
        return ended

    def _tell(self, one: Running) -> None:
        """One line about a trial that has ended."""
        trial = one.trial
        status, reason = trial.status()
        found = next((r for r in self.results() if r.name == trial.name), None)
        value = "" if found is None or found.value is None else f" {found.value:.4g}"
        said = "stopped and saved" if status == "open" else status
        words = [f"{trial.name} {said}{value} in {duration(one.seconds)}: {shown(trial.point)}"]
        words += [f"  {reason}"] if reason else []
        over = sum(t.status()[0] != "open" for t in self.plan.trials)
        ahead = best(rows(self.results(), self.objective))
        more = f"{over} of {self._num_planned()} over"
        if ahead is not None and ahead.value is not None:
            more += f", best {ahead.value:.4g} ({name_of(ahead.number, 0)})"
        left = self.left()
        more += f", about {duration(left)} left" if left else ""
        self.say("\n".join([*words, f"  {more}"]))

    def _num_planned(self) -> int:
        method = self.config.method
        points = method.trials if isinstance(method, OptunaConfig) else 0
        return max(len(self.plan.trials), points * self.config.repeats)

    def _watch(self) -> None:
        """Prune what will not win."""
        if self.config.pruner is None or time.monotonic() < self._watched + WATCH_SECONDS:
            return
        self._watched = time.monotonic()
        curves = {trial.name: self._curve(trial) for trial in self.plan.trials}
        for name, one in self.running.items():
            if one.pruned or not curves[name]:
                continue
            others = [curve for other, curve in curves.items() if other != name]
            reason = pruner.verdict(self.config.pruner, self.objective.sign, curves[name], others)
            if reason is not None:
                step, value = curves[name][-1]
                one.trial.prune(step, value, reason)
                one.prune()

    def _curve(self, trial: Trial) -> list[tuple[int, float]]:
        tail = self._tails.get(trial.name)
        if tail is None:
            objective = self.objective
            tail = Tail(trial.folder, objective.stage, objective.metric.name)
            self._tails[trial.name] = tail
        return tail.read()

    def _stop(self) -> None:
        """Let every trial save and end; a second signal kills them."""
        self.say(f"stopping {len(self.running)} trials, which save first")
        for one in self.running.values():
            one.signal(signal.SIGUSR1)
        until = time.monotonic() + self.plan.base.config.resilience.grace_s + 2 * SPARE_SECONDS
        while self.running and time.monotonic() < until and len(self.received) < 2:
            self._collect()
            time.sleep(POLL_SECONDS / 2)


@contextlib.contextmanager
def _signals(received: list[int]) -> Iterator[None]:
    """Note signals; the loop asks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {
        number: signal.signal(number, lambda n, _: received.append(n))
        for number in heeded((signal.SIGINT, *SIGNALS))
    }
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
