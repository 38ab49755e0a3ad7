"""Completions without a score: named once a kind, counted in a row, never passed over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardwise.errors import ShardwiseError
from shardwise.rewards import kind_of

MAX_KINDS = 20  # named in one stage; a reason that always differs must not flood the terminal


class UnscorableError(ShardwiseError):
    """Nothing was scored for so long that there is nothing to learn from."""


class Unscored:
    """Watches the reasons of one stage's completions; ``reasons``: "" where there is a score.

    All ranks see the same completions, and decide alike.
    """

    def __init__(self, stage: str, limit: int) -> None:
        self.stage, self.limit = stage, limit
        self.seen: list[str] = []  # kinds that were named
        self.in_row = 0  # steps up to now without any score
        self.scored = False  # whether anything was, ever
        self.last = ""
        self._events: list[tuple[str, str]] = []

    def step(self, reasons: Sequence[str], last_step: bool) -> bool:
        """One step's completions; whether any has a score. Raises UnscorableError."""
        self._events += new_kinds(reasons, self.seen)
        if any(not r for r in reasons):
            self.in_row, self.scored = 0, True
            return True
        self.in_row, self.last = self.in_row + 1, reasons[0]
        text = (
            f"no completion could be scored, nothing was learnt ({self.in_row} such steps in a "
            f"row): {self.last}"
        )
        self._events.append(("unscorable_step", text))
        if self.in_row >= self.limit or (last_step and not self.scored):
            raise UnscorableError(
                f"stage {self.stage}: {self.in_row} steps in a row without any completion that "
                f"could be scored: {self.last}. Mend the reward; rollouts with all reasons are "
                f"kept with keep_rollouts_every=1 (max_unscorable_steps is {self.limit})"
            )
        return False

    def events(self) -> list[tuple[str, str]]:
        """What was noticed since the last call, as (kind, text)."""
        found, self._events = self._events, []
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"seen": self.seen, "in_row": self.in_row, "scored": self.scored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`; a checkpoint of an older version holds nothing."""
        self.seen = list(state.get("seen", []))
        self.in_row, self.scored = int(state.get("in_row", 0)), bool(state.get("scored", False))


def new_kinds(reasons: Iterable[str], seen: list[str]) -> list[tuple[str, str]]:
    """An event with the first reason of each kind that is not in ``seen``, which grows."""
    reasons = list(reasons)
    counts = Counter(kind_of(r) for r in reasons if r)
    events = []
    for reason in reasons:
        kind = kind_of(reason)
        if not reason or kind in seen or len(seen) > MAX_KINDS:
            continue
        seen.append(kind)
        if len(seen) > MAX_KINDS:
            events.append(("unscorable", "more kinds of reasons follow, which are not named here"))
            continue
        events.append(
            ("unscorable", f"{counts[kind]} of {len(reasons)} completions without score: {reason}")
        )
    return events
