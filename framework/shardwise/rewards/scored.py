"""What a score may be, and how a reason for having none is told."""

from __future__ import annotations

import dataclasses
import math
import re

# Beyond it, squares of float32 overflow: means, deviations and gradients would not be finite.
MAX_REWARD = 1e12
MAX_REASON_CHARS = 300


@dataclasses.dataclass(frozen=True)
class Scored:
    """One item's score, or the reason why there is none."""

    value: float | None
    reason: str = ""


def is_usable(value: float | None) -> bool:
    """Whether a number can be learnt from."""
    return value is not None and math.isfinite(value) and abs(value) <= MAX_REWARD


def scored(value: float, what: str) -> Scored:
    """A number as a score; unscorable where it cannot be averaged. ``what`` gave it."""
    if is_usable(value):
        return Scored(float(value) + 0.0)  # no negative zero
    large = f"; more than {MAX_REWARD:g} cannot be averaged: scale it"
    return Scored(None, f"{what} {value:g}{large if math.isfinite(value) else ''}")


def unscorable(reason: str) -> Scored:
    """A reason as it may be shown: short, on one line, control characters escaped."""
    line = " ".join(reason.split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return Scored(None, text[:MAX_REASON_CHARS])


def kind_of(reason: str) -> str:
    """What reasons of one kind share: part and error, without what differs from text to text."""
    head = ": ".join(reason.split(": ")[:2])
    return re.sub(r"\d+(?:[.,]\d+)*(?:e[-+]?\d+)?", "#", head)
