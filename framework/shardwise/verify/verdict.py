"""What verify says of a layout, and of all that were asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

from shardwise.verify.compare import Difference


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One layout of one stage in one precision.

    ``worst``: for each kind of value, the largest error over its bound. ``first``: the first value
    of a training step that rounding does not explain; ``suspect``: see `suspects`.
    """

    stage: str
    layout: str
    precision: str
    worst: dict[str, float]
    seconds: float
    first: Difference | None = None
    suspect: str = ""
    problem: str = ""  # why there is nothing to compare
    volumes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    shape: str = ""  # of the small recipe, and the user's facts that it has not
    given_up: tuple[str, ...] = ()
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # compared, by kind
    where: str = ""  # in the update the difference begins

    @property
    def passed(self) -> bool:
        """Whether every value is within its bound on every rank."""
        return self.first is None and not self.problem

    def sentence(self) -> str:
        """What failed, where, and whom to suspect."""
        blamed = f"; suspect: {self.suspect}" if self.suspect else ""
        if self.problem:
            return self.problem + blamed
        if self.first is None:
            return ""
        d = self.first
        error = d.why or f"error {d.error:.2e} against {d.bound:.2e}"
        named = f"{d.kind} {d.name}, " if d.name else ""
        text = f"first to differ: {named}{error}"
        if d.times is not None:
            text += f", {d.times:.4g} times what it should be" if d.times else ", all of it zero"
        if d.worst:
            text += f", worst at {list(d.worst)}"
        if d.ranks:
            text += f" held by rank {', '.join(map(str, d.ranks))}"
        text += f"; {self.where}" if self.where else ""
        return text + blamed


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """All verdicts, and the layouts that this recipe cannot have (with the reason).

    ``impossible`` are those of ``refused`` that were asked for by name, not as part of the suite.
    ``notes``: what a reader should know of the engines.
    """

    verdicts: list[Verdict]
    refused: dict[str, str]
    impossible: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all that was asked for computes the right thing; of the suite, what can be."""
        tried = bool(self.verdicts) and not self.impossible
        return tried and all(v.passed for v in self.verdicts)
