"""What the server does, without HTTP: answers, feedback, weights."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from shardwise.data.tokenizer import Tokenizer
from shardwise.errors import ShardwiseError, UserError
from shardwise.rollout.sequences import Request
from shardwise.serve import log as logs
from shardwise.serve.answers import Answer
from shardwise.serve.asks import (
    ChatBody,
    CompletionBody,
    FeedbackBody,
    Limits,
    UpdateBody,
    checked,
    read_ask,
)
from shardwise.serve.clients import Rates
from shardwise.serve.errors import ApiError
from shardwise.serve.served import Served
from shardwise.serve.worker import Piece, Ticket, Worker
from shardwise.storage.durable import StorageError

log = logging.getLogger(__name__)
MAX_RATABLE = 10_000  # answers that can still be rated; the oldest go first
_GRACE = 10.0  # seconds after its deadline in which an engine must have ended a sequence
_ID = re.compile(r"(?:chatcmpl|cmpl)-[0-9a-f]{24}")


class Session:
    """One request in flight: its answer grows by `next` until it has ended. `close` it."""

    def __init__(self, service: Service, client: str, answer: Answer, store: bool) -> None:
        self.answer, self.client = answer, client
        self.logged = store and service.log is not None
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece] = asyncio.Queue()
        self._deadline = time.monotonic() + service.limits.deadline
        self._ticket: concurrent.futures.Future[Ticket] | None = None

    async def start(self) -> None:
        """Hand the request to the engine. Raises ApiError."""
        ask, worker = self.answer.ask, self._service.worker
        self._ticket = worker.submit(
            self.answer.model,
            Request(0, ask.prompt_tokens, ask.num_choices),
            ask.sampling,
            ask.key,
            self._deadline,
            self._hear,
        )
        try:
            await asyncio.shield(asyncio.wrap_future(self._ticket))
        except UserError as error:
            raise ApiError(400, str(error)) from None
        except RuntimeError as error:
            raise ApiError(503, str(error), retry_after=1.0) from None

    def _hear(self, piece: Piece) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def next(self) -> Piece:
        """What came next; it is not yet taken by the answer. Raises ApiError."""
        left = self._deadline + _GRACE - time.monotonic()
        try:
            piece = await asyncio.wait_for(self._queue.get(), max(left, 0.0))
        except TimeoutError:
            raise ApiError(504, "the answer took too long; ask for fewer tokens") from None
        if piece.error:
            raise ApiError(500, piece.error)
        return piece

    async def keep(self) -> None:
        """Log the ended answer, if it is to be logged. Raises ApiError when it cannot be."""
        if self.logged:
            record = {"time": round(time.time(), 3), "client": self._service.hashed(self.client)}
            await self._service.append(logs.LogWriter.answer, {**record, **self.answer.record()})
            self._service.ratable(self.answer.id, self.client, len(self.answer.choices))

    def close(self) -> None:
        """Give back what the request holds; the engine forgets what has not ended."""
        self._service.rates.leave(self.client)
        if self._ticket is not None and not self.answer.ended:
            self._ticket.add_done_callback(self._release)

    def _release(self, ticket: concurrent.futures.Future[Ticket]) -> None:
        if not ticket.cancelled() and ticket.exception() is None:
            self._service.worker.release(ticket.result())


class Service:
    """Models that are served by one worker, and the log of it."""

    def __init__(
        self,
        worker: Worker,
        models: Mapping[str, Served],
        tokenizer: Tokenizer,
        max_seq_len: int,
        limits: Limits,
        writer: logs.LogWriter | None = None,
    ) -> None:
        self.worker, self.models, self.limits, self.log = worker, dict(models), limits, writer
        self.rates = Rates(limits.per_minute, limits.in_flight_per_client, limits.in_flight)
        self._tokenizer, self._max_seq_len = tokenizer, max_seq_len
        self._started = int(time.time())
        self._answers: OrderedDict[str, tuple[str, int]] = OrderedDict()  # id: client, choices
        self._disk = concurrent.futures.ThreadPoolExecutor(1, "shardwise-log")
        self._updates = asyncio.Lock()
        if writer is not None:
            for _, record in logs.read(writer.file):
                if record["kind"] == "answer":
                    self._note(record["id"], record["client"], len(record["choices"]))

    def model_list(self) -> dict[str, Any]:
        """Of ``/v1/models``: the base, and each adapter with what it is now."""
        return {"object": "list", "data": [self.model(name) for name in self.models]}

    def model(self, name: str) -> dict[str, Any]:
        """Of ``/v1/models/NAME``. Raises ApiError."""
        served = self._served(name)
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "shardwise",
            "weights": self.worker.checksum(name),
            "version": served.version,
        }

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests are answered, and what is in flight."""
        alive = self.worker.alive
        status = "ok" if alive else "the engine's thread has ended"
        return alive, {"status": status, "in_flight": self.worker.in_flight}

    async def begin(self, client: str, chat: bool, body: Any) -> Session:
        """Check a request and start it. Raises ApiError; else the caller closes the session."""
        asked = checked(ChatBody if chat else CompletionBody, body)
        name = next(iter(self.models)) if asked.model is None else asked.model
        self._served(name)
        seed = secrets.randbits(62)
        # A long prompt takes its time to be cut into tokens: not on the event loop.
        ask = await asyncio.to_thread(
            read_ask, asked, self._tokenizer, self.limits, self._max_seq_len, seed
        )
        answer_id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        answer = Answer(ask, answer_id, name, int(time.time()), self._tokenizer)
        self.rates.enter(client)
        try:
            session = Session(self, client, answer, ask.store)
        except BaseException:
            self.rates.leave(client)
            raise
        try:
            await session.start()
        except BaseException:
            session.close()
            raise
        return session

    async def feedback(self, client: str, body: Any) -> dict[str, Any]:
        """Keep what a client says of an answer that it got. Raises ApiError."""
        said: FeedbackBody = checked(FeedbackBody, body)
        if self.log is None:
            raise ApiError(403, "this server keeps no log, so feedback would be lost")
        if (said.rating is None) == (said.correction is None):
            raise ApiError(400, "give a rating (1 or -1) or a correction (a text)", param="rating")
        if said.correction is not None:
            await asyncio.to_thread(self._check_correction, said.correction)
        known = self._answers.get(said.id) if _ID.fullmatch(said.id) else None
        if known is None or known[0] != self.hashed(client):
            raise ApiError(404, "no answer of yours has this id, or it is too old", param="id")
        if said.choice >= known[1]:
            raise ApiError(400, f"choice: the answer has {known[1]}", param="choice")
        record: dict[str, Any] = {"id": said.id, "choice": said.choice}
        record |= {"time": round(time.time(), 3), "client": self.hashed(client)}
        kept = {"rating": said.rating, "correction": said.correction}
        record |= {key: value for key, value in kept.items() if value is not None}
        await self.append(logs.LogWriter.feedback, record)
        return {"object": "feedback", "id": said.id, "choice": said.choice, "kept": True}

    def _check_correction(self, text: str) -> None:
        tokens = len(self._tokenizer.encode(text))
        if not text.strip() or tokens > self.limits.completion_tokens:
            raise ApiError(
                400,
                f"correction: 1 to {self.limits.completion_tokens} tokens",
                param="correction",
            )

    async def update(self, body: Any) -> dict[str, Any]:
        """Serve a version of an adapter from now on. Raises ApiError."""
        said: UpdateBody = checked(UpdateBody, body)
        served = self._served(said.model)
        try:
            await self.swap(served, said.version)
        except ShardwiseError as error:
            raise ApiError(409, f"the weights stay as they are: {error}") from None
        return self.model(said.model)

    async def swap(self, served: Served, version: str | None = None) -> bool:
        """Serve ``version`` (None: what the pointer says); whether that is another than before.

        Weights are read and merged beside the engine, which stops for the copy alone. Raises
        ShardwiseError when they cannot be had; the old ones then answer on.
        """
        async with self._updates:
            wanted = await asyncio.to_thread(served.wanted, version)
            if wanted == served.version:
                return False
            weights = await asyncio.to_thread(served.weights, wanted)
            await asyncio.wrap_future(self.worker.update(served.name, weights))
            served.version = wanted
            return True

    async def watch(self, every: float) -> None:
        """Follow the pointers of adapters, for ever."""
        failed: dict[str, str] = {}
        while True:
            await asyncio.sleep(every)
            for served in self.models.values():
                try:
                    if served.learned and await self.swap(served):
                        log.warning("%s: now serves %s", served.name, served.version)
                    failed.pop(served.name, None)
                except Exception as error:  # told once
                    if failed.get(served.name) != str(error):
                        log.warning("%s: keeps its weights: %s", served.name, error)
                        failed[served.name] = str(error)

    async def append(self, kind: Any, record: dict[str, Any]) -> None:
        """Write to the log, off the event loop. Raises ApiError."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._disk, kind, self.log, record)
        except StorageError as error:
            log.error("the log: %s", error)
            raise ApiError(503, "the log cannot be written; nothing was kept") from None

    def hashed(self, client: str) -> str:
        """A client's name in the log."""
        assert self.log is not None
        return self.log.client(client)

    def ratable(self, answer_id: str, client: str, choices: int) -> None:
        """An answer is in the log, and its client may rate it."""
        self._note(answer_id, self.hashed(client), choices)

    def _note(self, answer_id: str, hashed: str, choices: int) -> None:
        self._answers[answer_id] = (hashed, choices)
        if len(self._answers) > MAX_RATABLE:
            self._answers.popitem(last=False)

    def _served(self, name: str) -> Served:
        if (found := self.models.get(name)) is None:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"no such model; served here: {known}", param="model", code="model_not_found"
            )
        return found

    def close(self) -> None:
        """End the worker and the log."""
        self.worker.close()
        self._disk.shutdown()
        if self.log is not None:
            with contextlib.suppress(OSError):
                self.log.close()
