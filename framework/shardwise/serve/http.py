"""The HTTP face of `service`, in Starlette: routes, who may do what, sizes, events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from shardwise import safe_files
from shardwise.serve.clients import is_loopback, match
from shardwise.serve.errors import ApiError
from shardwise.serve.service import Service, Session

log = logging.getLogger(__name__)
T = TypeVar("T")
_LOGGED = "x-shardwise-logged"


class Gone(Exception):  # noqa: N818
    """The client has left."""


class Api:
    """The application's handlers. ``tokens``: of clients; ``admin_tokens``: of who swaps weights.

    Without tokens, only requests to a loopback name are taken: a page in a browser must not reach
    the server under a name of its own.
    """

    def __init__(
        self, service: Service, tokens: tuple[str, ...], admin_tokens: tuple[str, ...]
    ) -> None:
        self.service, self._tokens, self._admin = service, tokens, admin_tokens

    def app(self, watch_every: float) -> Starlette:
        """The application; pointers are followed every so many seconds."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            watching = asyncio.create_task(self.service.watch(watch_every))
            try:
                yield
            finally:
                watching.cancel()

        def route(path: str, method: str, handler: Callable[..., Awaitable[Response]]) -> Route:
            return Route(path, self._answering(handler), methods=[method])

        routes = [
            route("/health", "GET", self._health),
            route("/v1/models", "GET", self._models),
            route("/v1/models/{name:path}", "GET", self._model),
            route("/v1/chat/completions", "POST", self._chat),
            route("/v1/completions", "POST", self._completions),
            route("/v1/feedback", "POST", self._feedback),
            route("/admin/update_weights", "POST", self._update),
        ]
        return Starlette(
            routes=routes,
            lifespan=lifespan,
            exception_handlers={HTTPException: _http_error, Exception: _unexpected},
        )

    def _answering(
        self, handler: Callable[..., Awaitable[Response]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """``handler``, with errors in OpenAI's form."""

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except ApiError as error:
                return _error(error)
            except Gone:
                return Response(status_code=499)

        return answer

    async def _health(self, request: Request) -> Response:
        alive, said = self.service.health()
        return JSONResponse(said, 200 if alive else 503)

    async def _models(self, request: Request) -> Response:
        self._client(request)
        return JSONResponse(self.service.model_list())

    async def _model(self, request: Request) -> Response:
        self._client(request)
        return JSONResponse(self.service.model(request.path_params["name"]))

    async def _chat(self, request: Request) -> Response:
        return await self._complete(request, chat=True)

    async def _completions(self, request: Request) -> Response:
        return await self._complete(request, chat=False)

    async def _complete(self, request: Request, chat: bool) -> Response:
        client = self._client(request)
        body = await self._body(request)
        session = await _unless_gone(request.receive, self.service.begin(client, chat, body))
        if session.answer.ask.stream:
            return _Events(session)
        try:
            return await _unless_gone(request.receive, _whole(session))
        finally:
            session.close()

    async def _feedback(self, request: Request) -> Response:
        client = self._client(request)
        return JSONResponse(await self.service.feedback(client, await self._body(request)))

    async def _update(self, request: Request) -> Response:
        self.service.rates.count("admin")
        if not match(request.headers.get("authorization"), self._admin):
            raise ApiError(403, "this needs the admin's token")
        return JSONResponse(await self.service.update(await self._body(request)))

    def _client(self, request: Request) -> str:
        """Who asks, counted. Raises ApiError."""
        address = request.client.host if request.client else ""
        if sum(len(k) + len(v) for k, v in request.headers.raw) > self.service.limits.header_bytes:
            raise ApiError(431, "the headers are too large")
        if not self._tokens:
            if not is_loopback(_host_name(request.headers.get("host", ""))):
                raise ApiError(403, "this server answers to localhost alone")
            client = f"address {address}"
        else:
            token = match(request.headers.get("authorization"), self._tokens)
            if token is None:
                self.service.rates.count(f"stranger {address}")  # guessing has a rate, too
                raise ApiError(401, "no valid token; send Authorization: Bearer TOKEN",
                               code="invalid_api_key")  # fmt: skip
            client = f"token {token}"
        self.service.rates.count(client)
        return client

    async def _body(self, request: Request) -> Any:
        """The JSON of a request, bounded in size and time. Raises ApiError."""
        # A page of a browser cannot send this type without asking first.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the body must be sent as application/json")
        limit = self.service.limits.body_bytes
        told = request.headers.get("content-length", "0")
        if not told.isdecimal() or len(told) > 15 or int(told) > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes")
        data = bytearray()
        try:
            async with asyncio.timeout(self.service.limits.read_timeout):
                async for part in request.stream():
                    data += part
                    if len(data) > limit:
                        raise ApiError(413, f"the body is larger than {limit} bytes")
        except TimeoutError:
            raise ApiError(408, "the body did not come in time") from None
        except Exception as error:
            if isinstance(error, ApiError):
                raise
            raise Gone from None
        try:
            return safe_files.parse_json(bytes(data))
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}") from None


def _host_name(header: str) -> str:
    """A Host header without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


async def _whole(session: Session) -> Response:
    while not session.answer.ended:
        session.answer.take(await session.next())
    await session.keep()
    return JSONResponse(session.answer.document(), headers=_headers(session))


def _headers(session: Session) -> dict[str, str]:
    return {_LOGGED: "true" if session.logged else "false", "cache-control": "no-store"}


class _Events(Response):
    """An answer as server-sent events, while it is drawn."""

    media_type = "text/event-stream"

    def __init__(self, session: Session) -> None:
        super().__init__(headers=_headers(session))
        self._session = session
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._stream(send))
        except Gone:
            pass
        finally:
            self._session.close()

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        answer = self._session.answer

        async def event(data: dict[str, Any] | str) -> None:
            text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
            line = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": line, "more_body": True})

        try:
            for chunk in answer.first_chunks():
                await event(chunk)
            while not answer.ended:
                for chunk in answer.chunks(await self._session.next()):
                    await event(chunk)
            await self._session.keep()
            if answer.ask.usage_chunk:
                await event(answer.usage_chunk())
            await event("[DONE]")
        except ApiError as error:
            await event(error.body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives. Raises Gone, and ends the work, when the client leaves first."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Gone
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            # It must have given back what it holds before anyone goes on.
            with contextlib.suppress(BaseException):
                await working


def _error(error: ApiError) -> Response:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    if error.status in (408, 413):  # what follows on the line is no request
        headers["connection"] = "close"
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(ApiError(error.status_code, str(error.detail)))


async def _unexpected(request: Request, error: Exception) -> Response:
    return _error(ApiError(500, "an error of the server's own"))
