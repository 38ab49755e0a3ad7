"""Who asks, and how much: tokens, and limits of rate.

A token is read from a file or from the environment variable `TOKEN`, never from the command line,
and is compared in constant time. What a log knows a client by is a keyed hash, so that neither its
token nor its address can be read there.
"""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from shardwise import safe_files
from shardwise.errors import UserError
from shardwise.serve.errors import ApiError

TOKEN, ADMIN_TOKEN = "SHARDWISE_SERVE_TOKEN", "SHARDWISE_SERVE_ADMIN_TOKEN"
MIN_TOKEN = 16  # characters
_TOKEN = re.compile(rf"[!-~]{{{MIN_TOKEN},512}}")
_MAX_CLIENTS = 4096  # remembered at once; the longest unheard is forgotten first


def read_tokens(
    file: Path | None, variable: str, environ: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """The tokens of a file (one a line; # begins a comment), else that of a variable.

    Raises UserError for a file that others may read, and for a token that is short or no word.
    """
    where = f"{file}" if file is not None else f"environment variable {variable}"
    if file is None:
        value = (os.environ if environ is None else environ).get(variable, "")
        lines = [value] if value else []
    else:
        try:
            if file.stat().st_mode & 0o077:
                raise UserError(f"{file}: others may read these tokens; chmod 600 {file}")
            lines = safe_files.read_text(file, 1 << 16).splitlines()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    found = [line.strip() for line in lines]
    tokens = [line for line in found if line and not line.startswith("#")]
    if file is not None and not tokens:
        raise UserError(f"{where}: holds no token; write one a line")
    for number, token in enumerate(tokens, 1):
        if not _TOKEN.fullmatch(token):
            raise UserError(
                f"{where}: token {number} must be {MIN_TOKEN} to 512 printable characters without "
                "spaces, e.g. of: openssl rand -hex 32"
            )
    return tuple(tokens)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def match(given: str | None, tokens: tuple[str, ...]) -> str | None:
    """The one of ``tokens`` that an Authorization header carries; takes the same time for all."""
    scheme, _, said = (given or "").partition(" ")
    found = None
    for token in tokens:
        if hmac.compare_digest(said.strip().encode(), token.encode()):
            found = token
    return found if scheme.lower() == "bearer" else None


@dataclasses.dataclass
class _Use:
    tokens: float
    at: float
    in_flight: int = 0


class Rates:
    """Requests of each client in a minute and in flight, and of all in flight."""

    def __init__(
        self,
        per_minute: int,
        in_flight: int,
        in_flight_of_all: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_minute, self._each, self._all = per_minute, in_flight, in_flight_of_all
        self._clock = clock
        self._uses: OrderedDict[str, _Use] = OrderedDict()
        self._busy = 0

    def count(self, client: str) -> None:
        """A request came. Raises ApiError (429) when the client has used up its minute."""
        now = self._clock()
        use = self._use(client, now)
        use.tokens = min(
            float(self._per_minute), use.tokens + (now - use.at) * self._per_minute / 60
        )
        use.at = now
        if use.tokens < 1:
            wait = (1 - use.tokens) * 60 / self._per_minute
            raise ApiError(
                429,
                f"at most {self._per_minute} requests in a minute; wait {wait:.1f} s",
                code="rate_limit_exceeded",
                retry_after=wait,
            )
        use.tokens -= 1

    def enter(self, client: str) -> None:
        """An answer begins. Raises ApiError (429) when too many are in flight; else `leave` it."""
        use = self._use(client, self._clock())
        if use.in_flight >= self._each or self._busy >= self._all:
            whose = "yours" if use.in_flight >= self._each else "all clients'"
            raise ApiError(
                429,
                f"too many requests in flight ({whose}); wait for one to end",
                code="too_many_in_flight",
                retry_after=1.0,
            )
        use.in_flight += 1
        self._busy += 1

    def leave(self, client: str) -> None:
        """An answer that `enter` let in has ended."""
        self._uses[client].in_flight -= 1
        self._busy -= 1

    def _use(self, client: str, now: float) -> _Use:
        use = self._uses.setdefault(client, _Use(float(self._per_minute), now))
        self._uses.move_to_end(client)
        if len(self._uses) > _MAX_CLIENTS:
            for name in [n for n, u in self._uses.items() if not u.in_flight][:1]:
                if name != client:
                    del self._uses[name]
        return use
