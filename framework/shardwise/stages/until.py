"""The stop rule of a flywheel: whether another round is worth it, and whose model goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.config.repeat import StopRule
from shardwise.errors import UserError
from shardwise.stages.base import StageContext
from shardwise.stages.jobs import Job, Outcome
from shardwise.stages.results import RESULT_FILE, read_here


def best_of_rounds(values: Sequence[float], rule: StopRule) -> tuple[int, bool]:
    """(the best round, counted from 0, whether to stop) from what each round came to.

    A round is better that adds at least ``min_gain``, and anything at all, to the best before. The
    rule stops after ``patience`` rounds in a row behind the best one.
    """
    best = 0
    for i, value in enumerate(values):
        gain = value - values[best]
        if gain > 0.0 and gain >= rule.min_gain:
            best = i
    return best, len(values) - 1 - best >= rule.patience


class UntilJob(Job):
    """Reads the results of the rounds that are done, and decides."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.config = ctx, ctx.stage
        self.data_hash = ""  # the results are held by their own lineage

    def finish(self, records: Sequence[Any]) -> Outcome:
        """See `Job.finish`. Raises UserError where a round has no such figure."""
        rounds: list[list[str]] = self.config.rounds
        found = [self._figure(names) for names in rounds[: self.config.done]]
        best, stop = best_of_rounds([value for _, value in found], self.config.rule)
        ends = stop or self.config.done == len(rounds)
        behind = rounds[best + 1 : self.config.done] if ends else []
        metric, (stage, value) = self.config.rule.metric, found[-1]
        return Outcome(
            {},
            {
                "round": float(self.config.done),
                "value": value,
                "best_round": best + 1.0,
                "best_value": found[best][1],
                "stop": float(stop),
            },
            message=f"{metric} {value:.4g} after {stage}; best so far {found[best][1]:.4g} after "
            f"{found[best][0]}: {'enough' if stop else 'another round' if not ends else 'done'}",
            skip=[n for names in rounds[self.config.done :] for n in names] if stop else (),
            drop=[n for names in behind for n in names],
        )

    def _figure(self, names: Sequence[str]) -> tuple[str, float]:
        """The last stage of a round that has the metric, and its value."""
        metric = self.config.rule.metric
        known: dict[str, Any] = {}
        for name in reversed(names):
            path = self.ctx.directory / "stages" / name / RESULT_FILE
            metrics: Mapping[str, Any] = (read_here(path) or {}).get("metrics", {})
            value = metrics.get(metric)
            if isinstance(value, (int, float)) and math.isfinite(value):
                return name, float(value)
            known |= metrics
        raise UserError(
            f"stages.{self.config.name}.rule.metric: no stage of {', '.join(names)} has the figure "
            f"{metric}; they have {', '.join(sorted(known)) or 'none'}: add an evaluation"
        )


def refuse(ctx: StageContext) -> Job:
    """A ``repeat`` is written out before anything runs."""
    raise UserError(f"stages.{ctx.stage.name}: a repeat that was not written out")
