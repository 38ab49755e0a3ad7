"""Optuna, in one file: told of every trial from its folder, it says what to try next.

The study is made anew for each question, with a sampler whose seed is a function of the sweep's
and the trial's number. So nothing of Optuna's is stored, and what it says is a function of
(seed, number, what has been run so far).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from shardwise.errors import ConfigError
from shardwise.sweep.config import Dimension, OptunaConfig, Point, SweepConfig, identity
from shardwise.sweep.objective import Curve
from shardwise.sweep.space import MOST_ATTEMPTS, draw, uniform

MAX_ATTEMPTS = 20  # of a sampler that says what was said before, until chance takes its place


@dataclasses.dataclass(frozen=True)
class Told:
    """A point that has a number. ``state``: running ones have no value yet."""

    point: Point
    state: Literal["running", "done", "pruned", "failed"]
    value: float | None = None
    curve: Curve = dataclasses.field(default_factory=list)


def require() -> Any:
    """The library. Raises ConfigError when it is not installed."""
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ConfigError(
            "method.kind: optuna is not installed; pip install 'shardwise[sweep]', or use random"
        ) from error


def ask(
    config: SweepConfig, told: Sequence[Told], better: Literal["lower", "higher"]
) -> Point | None:
    """The next point, none that has been told of; None when there is hardly another.

    Raises ConfigError when Optuna is not installed.
    """
    optuna = require()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    method = config.method
    assert isinstance(method, OptunaConfig)
    known = {identity(one.point) for one in told}
    for attempt in range(MAX_ATTEMPTS):
        seed = int(uniform(method.seed, len(told), attempt) * 2**31)
        sampler = _sampler(optuna, method, seed)
        study = optuna.create_study(
            direction="minimize" if better == "lower" else "maximize", sampler=sampler
        )
        for one in told:
            study.add_trial(_frozen(optuna, config, one))
        point = _suggest(optuna, config, study.ask())
        if identity(point) not in known:
            return point
    draws = (draw(config, method.seed, len(told), attempt) for attempt in range(MOST_ATTEMPTS))
    return next((point for point in draws if identity(point) not in known), None)


def _sampler(optuna: Any, method: OptunaConfig, seed: int) -> Any:
    """Only samplers that know no more than the trials: others keep their state in the study."""
    kinds = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
    return kinds[method.sampler](seed=seed, n_startup_trials=method.startup_trials)


def _label(dimension: Dimension, value: Any) -> Any:
    """A value as Optuna knows it: its categories are plain, so others go by their JSON."""
    plain = isinstance(value, str | int | float | bool) or value is None
    return value if plain or dimension.low is not None else json.dumps(value, sort_keys=True)


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    low, high = dimension.low, dimension.high
    if low is None or high is None:
        return optuna.distributions.CategoricalDistribution(
            [_label(dimension, value) for value in dimension.choices or []]
        )
    log = dimension.scale == "log"
    if dimension.integers:
        step = 1 if dimension.step is None else int(dimension.step)
        return optuna.distributions.IntDistribution(low, high, log=log, step=step)
    return optuna.distributions.FloatDistribution(low, high, log=log, step=dimension.step)


def _suggest(optuna: Any, config: SweepConfig, trial: Any) -> Point:
    """A condition makes a space in which a key is there or not, as Optuna's define-by-run does."""
    point: Point = {}
    for key in config.order:
        dimension = config.search[key]
        if config.active(key, point):
            said = trial._suggest(key, _distribution(optuna, dimension))
            choices = dimension.choices if dimension.low is None else None
            if choices is not None:
                said = next(v for v in choices if _label(dimension, v) == said)
            elif isinstance(said, float):
                assert dimension.low is not None and dimension.high is not None
                said = min(max(float(f"{said:.6g}"), dimension.low), dimension.high)
            point[key] = said
    return point


def _frozen(optuna: Any, config: SweepConfig, one: Told) -> Any:
    states = optuna.trial.TrialState
    state = {
        "running": states.RUNNING,
        "done": states.COMPLETE,
        "pruned": states.PRUNED,
        "failed": states.FAIL,
    }[one.state]
    if one.state == "done" and one.value is None:  # it ended, and measured nothing
        state = states.FAIL
    return optuna.trial.create_trial(
        state=state,
        value=one.value if state == states.COMPLETE else None,
        params={key: _label(config.search[key], value) for key, value in one.point.items()},
        distributions={key: _distribution(optuna, config.search[key]) for key in one.point},
        intermediate_values=dict(one.curve),
    )
