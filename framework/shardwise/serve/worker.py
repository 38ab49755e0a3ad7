"""The thread that owns the rollout engines: nothing else calls them.

Requests come and go by `submit` and `release`, weights by `update`; each waits its turn between two
steps. Every model that is served (the base, and each adapter over it) has an engine of its own, and
those with sequences in flight step in turns.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import TypeVar

from torch import Tensor

from shardwise.rollout.config import Sampling
from shardwise.rollout.engine import RolloutEngine
from shardwise.rollout.sequences import Completion, Request

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one step added to one choice of a request: tokens, and their log-probabilities.

    ``weights``: the checksum of those that drew the tokens. ``error``: why there will be no more.
    """

    choice: int
    token_ids: list[int]
    weights: str
    completion: Completion | None = None
    error: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)


Listener = Callable[[Piece], None]


@dataclasses.dataclass(frozen=True)
class Ticket:
    """A request in an engine: what `release` needs."""

    model: str
    sequences: tuple[int, ...]


class Worker:
    """Runs ``engines``, by the names of the models that they serve, until `close`."""

    def __init__(self, engines: Mapping[str, RolloutEngine]) -> None:
        self._engines = dict(engines)
        self._live: dict[str, dict[int, tuple[int, Listener]]] = {name: {} for name in engines}
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = threading.Lock()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="shardwise-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still works."""
        return self._open and self._thread.is_alive()

    def submit(
        self, model: str, request: Request, sampling: Sampling, key: int, deadline: float,
        listener: Listener,
    ) -> Future[Ticket]:  # fmt: skip
        """Queue a request; ``listener`` hears its pieces, on the engine's thread.

        The future raises what the engine does: UserError for a prompt that it does not take.
        """

        def work() -> Ticket:
            engine = self._engines[model]
            numbers = engine.submit(request, sampling, key, deadline=deadline)
            self._live[model] |= {n: (i, listener) for i, n in enumerate(numbers)}
            return Ticket(model, tuple(numbers))

        return self._call(work)

    def release(self, ticket: Ticket) -> Future[int]:
        """End what is left of a request without a word; how many sequences that were."""

        def work() -> int:
            live = self._live[ticket.model]
            left = [n for n in ticket.sequences if live.pop(n, None) is not None]
            for number in left:
                self._engines[ticket.model].release(number)
            return len(left)

        return self._call(work)

    def update(self, model: str, weights: Iterable[tuple[str, Tensor]]) -> Future[str]:
        """Other weights (our names) for a model; its sequences go on with them. The checksum."""
        return self._call(lambda: self._engines[model].update_weights(weights, hf_names=False))

    def checksum(self, model: str) -> str:
        """Of the weights that answer now."""
        return self._engines[model].checksum

    @property
    def in_flight(self) -> int:
        """Sequences that are not ended."""
        return sum(len(live) for live in self._live.values())

    def close(self) -> None:
        """End the thread; what is in flight hears an error."""
        with self._closed:
            if self._open:
                self._open = False
                self._calls.put(None)
        self._thread.join()

    def _call(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._closed:
            if not self._open:
                future.set_exception(RuntimeError("the server is stopping"))
            else:
                self._calls.put(run)
        return future

    def _run(self) -> None:
        while True:
            idle = not any(self._live.values())
            try:
                call = self._calls.get(block=idle)
            except queue.Empty:
                self._step()
                continue
            if call is None:
                break
            call()
        for name in self._engines:
            self._fail(name, "the server is stopping")
        while not self._calls.empty():
            if (call := self._calls.get()) is not None:
                call()

    def _step(self) -> None:
        """One step of every engine that has something in flight."""
        for name, engine in self._engines.items():
            if not (live := self._live[name]):
                continue
            try:
                moved = engine.step()
            except Exception as error:
                log.exception("a step of the engine of %r failed", name)
                self._fail(name, f"the engine failed: {type(error).__name__}")
                continue
            if not moved:  # it has forgotten what we wait for
                self._fail(name, "the engine dropped the sequence")
            for progress in moved:
                place = live.get(progress.sequence)
                if place is None:
                    continue
                if progress.completion is not None:
                    del live[progress.sequence]
                choice, listener = place
                new, done = progress.token_ids, progress.completion
                piece = Piece(choice, new, engine.checksum, done, logprobs=progress.logprobs)
                self._tell(listener, piece)

    def _fail(self, name: str, why: str) -> None:
        """Every sequence of a model ends with an error, and the engine forgets it."""
        live, self._live[name] = self._live[name], {}
        for number, (choice, listener) in live.items():
            try:
                self._engines[name].release(number)
            except Exception:
                log.exception("sequence %d cannot be released", number)
            self._tell(listener, Piece(choice, [], self._engines[name].checksum, error=why))

    def _tell(self, listener: Listener, piece: Piece) -> None:
        try:
            listener(piece)
        except Exception as error:  # its event loop is gone
            log.warning("nobody hears of a piece: %s", error)
