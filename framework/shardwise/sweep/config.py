"""What a sweep's YAML may say: data only, conditions and spaces too, never code. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from shardwise.config.explain import nearest
from shardwise.config.load import load_section
from shardwise.config.names import RUN_FOLDER
from shardwise.config.section import (
    BelowOne,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
)

MOST_LISTED = 10_000  # values of a range; one of more is drawn from, and is no grid


def among(value: Any, values: Sequence[Any]) -> bool:
    """Whether a value of a YAML is one of others: 1, 1.0 and true are three."""
    return json.dumps(value, sort_keys=True) in [json.dumps(v, sort_keys=True) for v in values]


Point = dict[str, Any]  # what a trial has for each key that is searched; in order of the search


def _dimension(data: Any) -> Any:
    return {"values": data} if isinstance(data, list) else data


class Dimension(Section):
    """What one key of the recipe may be: ``values``, ``options``, or a range ``low`` to ``high``.

    A list is short for ``values``. ``options`` has a name of its own in place of a key, and gives
    several keys at once. Without an integer ``step`` or two integer ends, a range is of numbers.
    """

    values: list[Any] | None = Field(None, min_length=1, description="each of these")
    options: dict[str, dict[str, Any]] | None = Field(
        None, min_length=1, description="by name, the keys that are set together"
    )
    low: int | float | None = Field(None, description="least value of a range")
    high: int | float | None = Field(None, description="greatest value of a range")
    scale: Literal["linear", "log"] = Field("linear", description="along which a range is drawn")
    step: int | float | None = Field(None, gt=0, description="of a range; null: any number")
    when: dict[str, list[Any]] = Field(
        default={}, description="searched only where another key has one of these values"
    )

    @model_validator(mode="after")
    def _says_one_thing(self) -> Dimension:
        said = [n for n in ("values", "options", "low", "high") if getattr(self, n) is not None]
        if said not in (["values"], ["options"], ["low", "high"]):
            raise ValueError(
                f"says {', '.join(said) or 'nothing'}; say values, options, or low and high"
            )
        if self.low is None or self.high is None:
            if self.step is not None or self.scale != "linear":
                raise ValueError("step and scale are of a range; leave them out, or say low, high")
            choices = self.choices or []
            double = [v for i, v in enumerate(choices) if among(v, choices[:i])]
            if double:
                raise ValueError(f"{json.dumps(double[0])} stands twice; keep one")
        elif self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        elif self.scale == "log" and (self.low <= 0 or self.step is not None):
            raise ValueError("a log scale needs low above 0, and no step")
        return self

    @property
    def integers(self) -> bool:
        """Whether the range is of integers."""
        ends = (self.low, self.high, 1 if self.step is None else self.step)
        return all(isinstance(end, int) for end in ends)

    @property
    def choices(self) -> list[Any] | None:
        """All values in order; None where there are too many to list: of numbers, or far apart."""
        if self.values is not None:
            return self.values
        if self.options is not None:
            return list(self.options)
        assert self.low is not None and self.high is not None
        step = self.step or (1 if self.integers else None)
        if step is None:
            return [self.low] if self.low == self.high else None
        num = math.floor((self.high - self.low) / step * (1 + 1e-12)) + 1
        return [self.low + i * step for i in range(num)] if num <= MOST_LISTED else None


class GridConfig(Section):
    """Every combination."""

    kind: Literal["grid"]


class ListConfig(Section):
    """The points that are listed, and ``search`` is left out."""

    kind: Literal["list"]
    points: list[dict[str, Any]] = Field(min_length=1, description="key: value, for each trial")


class RandomConfig(Section):
    """Draws that are a function of the seed and the trial's number."""

    kind: Literal["random"]
    trials: PositiveInt = Field(description="how many points")
    seed: Seed = Field(0, description="of the draws")


class OptunaConfig(Section):
    """A sampler of Optuna's, told of every trial from its folder (extra `sweep`)."""

    kind: Literal["optuna"]
    trials: PositiveInt = Field(description="how many points")
    seed: Seed = Field(0, description="of the sampler")
    sampler: Literal["tpe", "gp"] = Field(
        "tpe", description="tree-structured Parzen estimators, or a Gaussian process"
    )
    startup_trials: NonNegativeInt = Field(5, description="drawn at random first")


def _kind(data: Any) -> Any:
    return {"kind": data} if isinstance(data, str) else data


Method = Annotated[
    GridConfig | ListConfig | RandomConfig | OptunaConfig, Field(discriminator="kind")
]


class MedianPrunerConfig(Section):
    """Stops a trial whose best so far is worse than the median of the others at that step."""

    kind: Literal["median"]
    min_steps: PositiveInt = Field(1, description="not before this step of the objective's stage")
    min_trials: PositiveInt = Field(3, description="that have reached that step")


class HalvingPrunerConfig(Section):
    """Asynchronous successive halving: at each rung, only the best share goes on.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning (ASHA), 2020.
    """

    kind: Literal["halving"]
    min_steps: PositiveInt = Field(description="the first rung")
    factor: int = Field(3, ge=2, le=100, description="between rungs, and of trials that go on")


Pruner = Annotated[MedianPrunerConfig | HalvingPrunerConfig, Field(discriminator="kind")]


class ObjectiveConfig(Section):
    """What trials are compared by: a metric that a stage declares."""

    stage: str | None = Field(None, description="default: the last")
    metric: str | None = Field(None, description="default: what the stage calls its best")
    better: Literal["lower", "higher"] | None = Field(
        None, description="default: what the metric's declaration says"
    )
    take: Literal["last", "best"] = Field("last", description="of the values of a trial")


class SlotsConfig(Section):
    """Where trials run beside each other; each is bound to cores, or GPUs, of its own."""

    number: PositiveInt = Field(1, description="trials at a time")
    cores: PositiveInt | None = Field(None, description="of a slot; default: an equal share")
    gpus: NonNegativeInt | None = Field(None, description="of a slot; default: an equal share")


class BudgetConfig(Section):
    """When no more trials start. Those that run are let end."""

    trials: PositiveInt | None = Field(None, description="started in all")
    hours: PositiveFloat | None = Field(None, description="that trials have run, all together")
    failures: PositiveInt | None = Field(None, description="trials that failed")


class BenchmarkConfig(Section):
    """`sweep --benchmark`: each trial is run in turns, A B C A B C, and its steps are timed."""

    turns: PositiveInt = Field(3, description="of each trial, in processes of their own")
    warmup: PositiveInt = Field(3, description="steps of a turn that do not count")
    steps: PositiveInt = Field(10, description="steps of a turn that count")
    max_others: BelowOne = Field(0.1, description="cores that others may burn")
    wait_s: float = Field(
        60.0, ge=0.0, le=1e6, description="for a quiet machine, before a turn; then it is measured"
    )


class SweepConfig(Section):
    """A whole sweep."""

    name: Annotated[str, RUN_FOLDER] = Field("sweep", description="what it is called on its page")
    sweep_dir: Path | None = Field(None, description="default: sweeps/<name>")
    recipe: Path = Field(description="a YAML recipe")
    overrides: dict[str, Any] = Field(default={}, description="key: value, of all trials")
    search: dict[str, Annotated[Dimension, BeforeValidator(_dimension)]] = Field(
        default={}, description="key of the recipe: what it may be"
    )
    method: Annotated[Method, BeforeValidator(_kind)] = Field(default=GridConfig(kind="grid"))
    pruner: Annotated[Pruner, BeforeValidator(_kind)] | None = Field(
        None, description="stops trials that will not win; null: none"
    )
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    repeats: PositiveInt = Field(1, description="of each point, with seeds that follow the first")
    ranks: PositiveInt | None = Field(
        None, description="processes of a trial; default: what its layouts ask for"
    )
    slots: SlotsConfig = Field(default_factory=SlotsConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    skip_impossible: bool = Field(
        False, description="leave out what cannot run; false: it is refused before any starts"
    )
    benchmark: BenchmarkConfig = Field(default_factory=BenchmarkConfig)

    @property
    def directory(self) -> Path:
        """Where the sweep lives."""
        return self.sweep_dir if self.sweep_dir is not None else Path("sweeps") / self.name

    @property
    def searched(self) -> set[str]:
        """Every key of the recipe that a trial may set."""
        if isinstance(self.method, ListConfig):
            return {key for point in self.method.points for key in point}
        options = [d.options for d in self.search.values() if d.options is not None]
        keys = {key for named in options for keys in named.values() for key in keys}
        return keys | {key for key, d in self.search.items() if d.options is None}

    @model_validator(mode="after")
    def _fits(self) -> SweepConfig:
        if isinstance(self.method, ListConfig):
            if self.search:
                self.refuse(("search",), "method list says its points itself; leave search out")
        elif not self.search:
            self.refuse(("search",), "is empty: nothing to search; give a key and its values")
        for key in self.searched & {"run_dir", "name"}:
            self.refuse(("search", key), "each trial has a folder of its own already")
        if both := sorted(self.searched & self.overrides.keys()):
            self.refuse(("overrides", both[0]), "is searched too; say it once")
        if "seed" in self.searched and self.repeats > 1:
            self.refuse(("repeats",), "give seeds of their own, and seed is searched; say it once")
        for key, dimension in self.search.items():
            for other, values in dimension.when.items():
                self._condition_holds(key, other, values)
        self._no_circle()
        if isinstance(self.method, GridConfig):
            endless = [key for key, d in self.search.items() if d.choices is None]
            if endless:
                self.refuse(("search", endless[0]), "a grid needs values; give values, or a step")
        return self

    def _condition_holds(self, key: str, other: str, values: list[Any]) -> None:
        """Refuse a condition that can never be true, or that asks about what is not searched."""
        if other not in self.search or other == key:
            others = [name for name in self.search if name != key]
            self.refuse(
                ("search", key, "when", other),
                f"is not searched{nearest(other, others) or '; ' + ', '.join(others)}",
            )
        choices = self.search[other].choices
        if choices is not None and not any(among(value, choices) for value in values):
            self.refuse(
                ("search", key, "when", other),
                f"is never {json.dumps(values)}; it is one of {json.dumps(choices)}",
            )

    def _no_circle(self) -> None:
        left = dict(self.search)
        while free := [k for k, d in left.items() if not d.when.keys() & left.keys()]:
            for key in free:
                del left[key]
        if left:
            self.refuse(("search", next(iter(left)), "when"), f"is a circle: {', '.join(left)}")

    @property
    def order(self) -> list[str]:
        """The searched keys, each behind those that its condition asks about."""
        found: list[str] = []
        while len(found) < len(self.search):
            found += [
                key
                for key, d in self.search.items()
                if key not in found and d.when.keys() <= set(found)
            ][:1]
        return found

    def active(self, key: str, point: Point) -> bool:
        """Whether ``key`` is searched where the keys before it are as in ``point``."""
        return all(
            other in point and among(point[other], values)
            for other, values in self.search[key].when.items()
        )

    @property
    def size(self) -> int | None:
        """Number of points of the space; None: without end."""
        if any(d.choices is None for d in self.search.values()):
            return None
        return len(self.grid())

    def grid(self) -> list[Point]:
        """Every point of a space that has an end, the last key fastest."""
        points: list[Point] = [{}]
        for key in self.order:
            choices = self.search[key].choices
            assert choices is not None
            points = [
                longer
                for point in points
                for longer in (
                    [{**point, key: value} for value in choices]
                    if self.active(key, point)
                    else [point]
                )
            ]
        return points

    def overrides_of(self, point: Point) -> dict[str, Any]:
        """What a trial says over the recipe: `overrides`, and the point with its options spelt."""
        found = dict(self.overrides)
        for key, value in point.items():
            named = self.search[key].options if key in self.search else None
            found |= {key: value} if named is None else named[value]
        return found


def identity(point: Point) -> str:
    """The same text for the same point, whatever the order of its keys."""
    return json.dumps(point, sort_keys=True)


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep's YAML. Raises ConfigError that lists every problem."""
    return load_section(path, SweepConfig)
