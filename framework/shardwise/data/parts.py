"""Rows kept apart for validation, by a hash of what is asked: equal prompts are never in both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any


def draw(raw: bytes) -> float:
    """A number in [0, 1) that follows from content alone: below a share, it is held out."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2.0**64


def is_held_out(raw: bytes, share: float) -> bool:
    """Whether content belongs to the held-out ``share``: so copies go together."""
    return draw(raw) < share


@dataclasses.dataclass(frozen=True)
class Part:
    """One side of rows that are parted: those of the ``share`` that is held out, or the others."""

    share: float = 0.0
    held_out: bool = False

    def has(self, asked: Any) -> bool:
        """Whether a row is in it; ``asked``: what it asks, plain data."""
        if not self.share:
            return not self.held_out
        raw = json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()
        return is_held_out(raw, self.share) == self.held_out


WHOLE = Part()
