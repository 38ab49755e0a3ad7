"""The engine without a cache, under the name that tests know it by."""

from __future__ import annotations

from shardwise.rollout.plain import PlainRollout as Oracle
from shardwise.rollout.sequences import Completion

__all__ = ["Oracle", "drain"]


def drain(engine: object) -> dict[int, Completion]:
    """Step an engine until nothing is in flight; the completions by their numbers."""
    found: dict[int, Completion] = {}
    while progress := engine.step():  # type: ignore[attr-defined]
        found |= {p.sequence: p.completion for p in progress if p.completion is not None}
    return found
