"""Rows of the user's files that nothing learns from: how many, why, and where the first stands.

Readers say each by its place, so that a file that is read twice counts once. Who wants to know
opens a `scope` around the reading. A token store keeps what was found when it was made, and is
opened without its files being read again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

EMPTY = "empty"
NOTHING_TO_LEARN = "without a token to learn"
AGAIN = "asked before"
OTHER_FILE = "files of another kind"


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """``rows`` for one ``reason``; ``first``: where the first is, a file and its line."""

    reason: str
    rows: int
    first: str

    def __str__(self) -> str:
        return f"{self.rows:,} {self.reason} (first: {self.first})"


class Found:
    """What was left out within a scope."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, set[int]]] = {}
        self._told: dict[tuple[str, str], int] = {}

    def add(self, reason: str, where: str) -> None:
        """One row, at ``where``."""
        self._places.setdefault(reason, (where, set()))[1].add(hash(where))  # texts take more room

    def tell(self, rows: Iterable[dict[str, Any]]) -> None:
        """Those that somebody else has counted, as `as_json` gives them."""
        for one in rows:
            self._told[one["reason"], one["first"]] = one["rows"]

    def all(self) -> list[LeftOut]:
        """By reason, in the order in which they came."""
        found = {reason: (first, len(seen)) for reason, (first, seen) in self._places.items()}
        for (reason, first), rows in self._told.items():
            before = found.get(reason, (first, 0))
            found[reason] = before[0], before[1] + rows
        return [LeftOut(reason, rows, first) for reason, (first, rows) in found.items()]

    def as_json(self) -> list[dict[str, Any]]:
        """The same as plain JSON."""
        return [dataclasses.asdict(one) for one in self.all()]


_scopes: list[Found] = []  # the innermost counts


@contextlib.contextmanager
def scope() -> Iterator[Found]:
    """Count what is left out inside."""
    _scopes.append(Found())
    try:
        yield _scopes[-1]
    finally:
        _scopes.pop()


def leave_out(reason: str, where: str) -> None:
    """One row at ``where`` is not learned from."""
    if _scopes:
        _scopes[-1].add(reason, where)


def tell(rows: Iterable[dict[str, Any]]) -> None:
    """See `Found.tell`."""
    if _scopes:
        _scopes[-1].tell(rows)


def too_long(tokens: int) -> str:
    """The reason of a row that no batch of this length holds."""
    return f"over {tokens:,} tokens"
