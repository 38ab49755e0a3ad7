"""Uvicorn: the socket, and the times that a connection may take."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from shardwise.errors import UserError
from shardwise.serve.asks import Limits


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0: a free one. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            why = "in use by another program; stop that one, or give another --port"
        elif getattr(error, "errno", None) in (errno.EACCES, errno.EPERM):
            why = "not allowed to this user; give a --port above 1023"
        else:
            why = f"cannot be had: {getattr(error, 'strerror', None) or error}"
        raise UserError(f"port {port} of {host}: {why}") from None
    return found


def _protocol(limits: Limits) -> type[H11Protocol]:
    """HTTP/1.1 that lets no slow client hold a connection."""

    class Protocol(H11Protocol):
        _reading: asyncio.TimerHandle | None = None  # runs while headers are awaited
        _writing: asyncio.TimerHandle | None = None  # runs while the client takes nothing

        @property
        def _busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._reading = self.loop.call_later(limits.read_timeout, self._late)

        def data_received(self, data: bytes) -> None:
            if self._reading is None and not self._busy:
                self._reading = self.loop.call_later(limits.read_timeout, self._late)
            super().data_received(data)
            if self._busy:
                _cancel(self._reading)
                self._reading = None

        def _late(self) -> None:
            self._reading = None
            if not self._busy:
                self.transport.abort()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self.loop.call_later(limits.send_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _cancel(self._writing)
            self._writing = None

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            _cancel(self._reading)
            _cancel(self._writing)

    return Protocol


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end it in order; they are not raised again behind that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ends = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in ends}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def server(app: Any, limits: Limits) -> uvicorn.Server:
    """A server of an application; ``run(sockets=[...])`` it until a signal ends it."""
    config = uvicorn.Config(
        app,
        http=_protocol(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # who asks is who is connected, not what a header says
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=limits.header_bytes,
    )
    return _Server(config)
