"""Which trials a sweep is made of: those in its folder and those to come, checked before any runs.

``sweep.json`` holds what gives existing trials their meaning. A sweep that has changed there is
refused; more trials, more repeats, more values of a grid and another budget are not.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise import safe_files
from shardwise.config import yaml12
from shardwise.config.load import LoadedConfig, leaves, load_config
from shardwise.config.redact import redact_data
from shardwise.config.run import RunConfig
from shardwise.config.source import dotted
from shardwise.errors import ConfigError, UserError
from shardwise.parallel.layout import world_of
from shardwise.stages.run import preflight
from shardwise.storage.durable import write_durably
from shardwise.sweep import asking, space
from shardwise.sweep.config import OptunaConfig, Point, RandomConfig, SweepConfig, identity
from shardwise.sweep.objective import Objective, objective_of
from shardwise.sweep.trial import TRIALS, Trial, name_of, override_words, read_trials

SWEEP_FILE = "sweep.json"


Impossible = tuple[int, int, Point, str]  # number, repeat, point and the reason


@dataclasses.dataclass
class Plan:
    """``base``: the recipe with the overrides of all trials. ``gpus``: of a slot.

    ``trials``: all that are in the folder, or known to come, by number and repeat.
    ``impossible``: by name, those that will not be run. ``same_seed``: repeats are runs
    of one seed (a benchmark's).
    """

    config: SweepConfig
    base: LoadedConfig
    objective: Objective
    gpus: int = 0
    same_seed: bool = False
    trials: list[Trial] = dataclasses.field(default_factory=list)
    impossible: dict[str, Impossible] = dataclasses.field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """The sweep's."""
        return self.config.directory

    def overrides_of(self, number: int, repeat: int, point: Point) -> dict[str, Any]:
        """All that a trial says over the recipe."""
        name = name_of(number, repeat)
        found = self.config.overrides_of(point)
        if repeat and not self.same_seed:
            found["seed"] = self.base.config.seed + repeat
        found["name"] = f"{self.config.name[:80]}-{name}"
        return found | {"run_dir": str(self.directory / TRIALS / name)}

    def trial(self, number: int, repeat: int, point: Point) -> Trial:
        """A trial to come, checked as `train` checks it. Raises UserError if it cannot run."""
        overrides = self.overrides_of(number, repeat, point)
        loaded = load_config(self.config.recipe, override_words(overrides))
        ranks = self.config.ranks or ranks_of(loaded.config, self.gpus or 1)
        if self.gpus and ranks > self.gpus:
            raise ConfigError(f"ranks: {ranks}, and a slot has {self.gpus} GPUs; raise slots.gpus")
        preflight(loaded.config, ranks, loaded.provenance)
        folder = self.directory / TRIALS / name_of(number, repeat)
        return Trial(folder, number, repeat, point, overrides, ranks)

    def numbers(self) -> set[int]:
        """Of the points that there are."""
        return {trial.number for trial in self.trials}


def ranks_of(run: RunConfig, ranks: int = 1) -> int:
    """Processes that the layouts of a run ask for, of ``ranks`` that ``auto`` may take."""
    return max(world_of(stage.engine.layout, ranks) for stage in run.stages)


def make_plan(config: SweepConfig, gpus: int = 0, same_seed: bool = False) -> Plan:
    """Read the folder, lay out the trials to come and check every one; writes nothing.

    Raises ConfigError that lists all that cannot run, unless the sweep skips those, or that names
    the key by which the sweep has changed under its trials.
    """
    base = load_config(config.recipe, override_words(config.overrides))
    plan = Plan(config, base, objective_of(config.objective, base.config), gpus, same_seed)
    plan.trials = read_trials(config.directory)
    check_unchanged(plan)
    if isinstance(config.method, OptunaConfig):
        asking.require()
        _check_samples(plan)
        known = {trial.number: trial.point for trial in plan.trials}
    else:
        known = _numbered(plan)
    _lay_out(plan, known)
    reasons = {name: reason for name, (*_, reason) in plan.impossible.items()}
    if reasons and not config.skip_impossible:
        raise ConfigError(_all_reasons(reasons))
    if not plan.trials and not isinstance(config.method, OptunaConfig):
        raise ConfigError(f"no trial can run: {_all_reasons(reasons)}")
    return plan


def _numbered(plan: Plan) -> dict[int, Point]:
    """Every point by its number: those of the folder keep theirs, and others count on."""
    points = space.points(plan.config)
    assert points is not None
    known = {identity(trial.point): trial.number for trial in plan.trials}
    planned = {identity(point) for point in points}
    for trial in plan.trials:
        if identity(trial.point) not in planned:
            raise ConfigError(
                f"{_where(plan.config)}: the point of trial {trial.name} in {plan.directory} is "
                f"not in it any more: {json.dumps(trial.point)}; take it back, or give the sweep "
                "another sweep_dir"
            )
    found = {number: json.loads(text) for text, number in known.items()}
    free = max(known.values(), default=-1) + 1
    for point in points:
        if identity(point) not in known:
            found[free] = point
            free += 1
    return found


def _where(config: SweepConfig) -> str:
    return "method.trials" if isinstance(config.method, RandomConfig) else "search"


def _lay_out(plan: Plan, points: Mapping[int, Point]) -> None:
    """Add the trials that are not in the folder yet; what cannot run goes to ``impossible``."""
    there = {(trial.number, trial.repeat) for trial in plan.trials}
    for number, point in sorted(points.items()):
        for repeat in range(plan.config.repeats):
            if (number, repeat) in there:
                continue
            try:
                plan.trials.append(plan.trial(number, repeat, point))
            except UserError as error:
                reason = reason_of(plan, point, error)
                plan.impossible[name_of(number, repeat)] = number, repeat, point, reason
                break
    plan.trials.sort(key=lambda trial: (trial.number, trial.repeat))


def _check_samples(plan: Plan) -> None:
    """Each value of each key once: what is wrong with a key is found before a trial starts."""
    reasons: dict[str, str] = {}
    for point in space.samples(plan.config):
        try:
            plan.trial(0, 0, point)
        except UserError as error:
            reasons[json.dumps(point)] = reason_of(plan, point, error)
    if reasons and not plan.config.skip_impossible:
        raise ConfigError(_all_reasons(reasons))


def reason_of(plan: Plan, point: Point, error: UserError) -> str:
    """A refusal, with the keys of the sweep in place of the command line's numbers."""
    keys = list(plan.overrides_of(0, 0, point))

    def named(found: re.Match[str]) -> str:
        index = int(found[1]) - 1
        return f"the sweep's {keys[index]}" if index < len(keys) else found[0]

    text = re.sub(r"command line override (\d+)", named, str(error))
    return text.removeprefix(f"{plan.config.recipe}: ")


def _all_reasons(reasons: Mapping[str, str]) -> str:
    """Every reason once, with those that have it."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    lines = [f"{_several(who)}: {reason}" for reason, who in names.items()]
    if len(reasons) == 1:
        return f"trial {lines[0]}"
    head = f"{len(reasons)} trials cannot run (skip_impossible: true leaves them out)"
    return "\n  ".join([head, *lines])


def _several(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- sweep.json ---------------------------------------------------------------------------------


def meaning(plan: Plan) -> dict[str, Any]:
    """What makes trials of a sweep comparable, and their numbers mean what they do."""
    config = plan.config
    method = config.method.model_dump(mode="json")
    found = {
        "recipe": redact_data(plan.base.config.model_dump(mode="json")),
        "method": {k: v for k, v in method.items() if k not in ("trials", "points")},
    }
    if isinstance(config.method, RandomConfig | OptunaConfig):
        found["search"] = {k: d.model_dump(mode="json") for k, d in config.search.items()}
    if isinstance(config.method, OptunaConfig):
        found["objective"] = str(plan.objective)
    return found


def check_unchanged(plan: Plan) -> None:
    """Refuse a sweep that is not the one its folder was made by. Raises ConfigError, DataError."""
    path = plan.directory / SWEEP_FILE
    try:
        before = safe_files.parse_json(safe_files.read_bytes(path))
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ConfigError(
            f"{path}: is damaged ({error}); delete it if the sweep is the same"
        ) from error
    old, new = (dict(leaves(data)) for data in (before, json.loads(json.dumps(meaning(plan)))))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            was, now = (json.dumps(side.get(key)) for side in (old, new))
            raise ConfigError(
                f"{dotted(key)}: is {now}, and was {was} when the trials in {plan.directory} were "
                "run; take it back, or give the sweep another sweep_dir"
            )


def write_meaning(plan: Plan) -> None:
    """Say what the sweep is, before its first trial starts."""
    text = json.dumps(meaning(plan), indent=1)
    write_durably(plan.directory / SWEEP_FILE, text.encode())


def with_words(config: SweepConfig, words: Sequence[str]) -> SweepConfig:
    """The sweep with ``key=value`` over its overrides. Raises ConfigError."""
    if not words:
        return config
    said = dict(config.overrides)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{word!r} is not of the form section.key=value")
        tree = yaml12.parse(value, key)
        if tree.problems:
            raise ConfigError(f"{tree.problems[0]}")
        said[key.strip()] = tree.data
    both = sorted(config.searched & said.keys())
    if both:
        raise ConfigError(f"{both[0]}: is searched by the sweep; it cannot be given beside that")
    return config.model_copy(update={"overrides": said})
