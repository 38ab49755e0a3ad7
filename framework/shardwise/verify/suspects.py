"""Whom to suspect: the smallest part of a layout that fails as the whole does.

A part that fails in another way is no suspect: the small recipe was made for the whole layout, and
a part of it may meet a bug of its own, or be refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from shardwise.parallel.layout import parse_layout
from shardwise.verify.bounds import like
from shardwise.verify.compare import Difference
from shardwise.verify.pool import RankError
from shardwise.verify.roles import parts_of, world_of
from shardwise.verify.walk import Walked

SINGLE = "dp1.zero0"
ALONE = "since the engine that trains differs alone, on one process"
ACCUMULATION = "accumulation of micro-batches"
# What the order of values tells: the first to differ had the right ones to be made from.
BEFORE = {
    "clip norm": "all before it is right: look at how it is summed",
    "weight": "all before it is right: look at the optimizer's step",
    "moment": "all before it is right: look at the optimizer's state",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a layout: what its ranks found, or the error that ended them."""

    ranks: list[Walked] = dataclasses.field(default_factory=list)
    found: list[Difference] = dataclasses.field(default_factory=list)
    error: RankError | TimeoutError | None = None

    @property
    def bugs(self) -> list[Difference]:
        """Differences that rounding does not explain, the nearest to a cause first."""
        return [d for d in self.found if d.is_bug]

    @property
    def problem(self) -> str:
        """The error in a sentence; empty where there was none."""
        return str(self.error).splitlines()[0] if self.error else ""

    @property
    def failed(self) -> bool:
        """Whether anything is wrong."""
        return self.error is not None or bool(self.bugs)

    def fails_as(self, other: Outcome) -> bool:
        """Whether what went wrong first in ``other`` went wrong here, too."""
        if other.error is not None:
            return type(self.error) is type(other.error) and _place(self) == _place(other)
        return _said(other.bugs[0]) in map(_said, self.bugs)


def _place(outcome: Outcome) -> tuple[str, str]:
    error = outcome.error
    return (error.cause, error.where) if isinstance(error, RankError) else ("", "")


def _said(difference: Difference) -> tuple[str, str, str]:
    """Which value: of what is no value, the words without their numbers."""
    why = "" if difference.name else like(difference.why)
    return difference.kind, difference.name, why


def suspect(
    layout: str, fails: Callable[[str], bool], is_sound_at_once: Callable[[str], bool]
) -> str:
    """The smallest part of ``layout`` that fails as the whole does, in words.

    ``is_sound_at_once``: whether nothing is wrong with a part if a rank's rows are one micro-batch.
    """
    # One process comes first: what it does no axis explains.
    found = next((p for p in (SINGLE, *sub_layouts(layout)) if fails(p)), layout)
    accumulates = is_sound_at_once(found)
    if found == SINGLE:
        return f"{ACCUMULATION}, {ALONE}" if accumulates else f"no axis, {ALONE}"
    return f"{found} with {ACCUMULATION}" if accumulates else found


def sub_layouts(layout: str) -> list[str]:
    """Layouts with some of this one's axes, the fewest first; never the layout itself.

    Of layouts by role: each role's alone.
    """
    if "=" in layout:
        return parts_of(layout)
    axes: list[list[str]] = []
    whole = parse_layout(layout, world_of(layout))
    if whole.dp > 1:
        hybrid = f".hsdp{whole.shard}" if whole.zero and whole.shard != whole.dp else ""
        own = f"dp{whole.dp}.zero{whole.zero}{hybrid}"
        axes.append(([f"dp{whole.dp}.zero0"] if whole.zero else []) + [own])
    if whole.tp > 1:
        axes.append([f"tp{whole.tp}"] + ([f"tp{whole.tp}.sp"] if whole.sp else []))
    if whole.pp > 1:
        chunks = f".v{whole.virtual}" if whole.schedule.startswith("interleaved") else ""
        named = f"pp{whole.pp}.{whole.schedule}{chunks}"
        axes.append(([f"pp{whole.pp}.1f1b"] if whole.schedule != "1f1b" else []) + [named])
    if whole.cp > 1:
        axes.append([f"cp{whole.cp}.{whole.cp_kind}"])
    found: list[tuple[str, ...]] = [()]
    for choices in axes:
        found += [(*a, b) for a in found for b in choices]
    parts = found[1:-1]  # the last has all axes, each as it is
    return [".".join(p) for p in sorted(parts, key=lambda p: (len(p), sum(map(len, p))))]
