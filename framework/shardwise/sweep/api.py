"""`shardwise.sweep`'s functions: run a sweep, look at what it would run, write its tables again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shardwise.errors import ConfigError, UserError
from shardwise.storage.durable import write_durably
from shardwise.storage.lock import LockedError, RunLock
from shardwise.sweep import slots
from shardwise.sweep.config import OptunaConfig, SweepConfig, load_sweep
from shardwise.sweep.plan import make_plan, with_words, write_meaning
from shardwise.sweep.process import command_of
from shardwise.sweep.results import Reader
from shardwise.sweep.run import Sweep, publish
from shardwise.sweep.table import PAGE_FILE, shown, value_text
from shardwise.sweep.trial import name_of, override_words


def sweep(
    path: str | Path | SweepConfig,
    overrides: Sequence[str] = (),
    number: int | None = None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Run a sweep's trials, or go on with them; returns what ``table.json`` holds.

    ``overrides``: ``key=value`` for all trials. ``number``: of slots. ``retry_failed``: failed
    trials are run again, from their last checkpoint.

    Raises ConfigError before anything is started, LockedError when another sweep lives in the
    folder, Stopped when a signal ended it (what ran has saved), NothingDone when no trial did.
    """
    config = _prepared(path, overrides, number)
    places = slots.slots(config.slots)
    with _held(config.directory):
        plan = make_plan(config, len(places[0].gpus or ()))
        write_meaning(plan)
        for trial in plan.trials if retry_failed else []:
            if trial.status()[0] == "failed":
                trial.reopen()
        return Sweep(plan, places).run()


def benchmark(path: str | Path | SweepConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Time the points of a sweep in turns; returns what ``benchmark.json`` in its folder holds.

    See `shardwise.sweep.benchmark.measured`. Turns that were run are not run again.
    """
    from shardwise.sweep import benchmark as timed

    config = timed.benchmark_of(_prepared(path, overrides, None))
    places = slots.slots(config.slots)
    with _held(config.directory):
        plan = timed.throughput(make_plan(config, len(places[0].gpus or ()), same_seed=True))
        write_meaning(plan)
        run = timed.Benchmark(plan, places)
        run.run()
        found = timed.measured(plan, run.results())
        for ending, text in {
            "json": json.dumps(found, indent=1),
            "md": timed.measured_text(found),
        }.items():
            write_durably(plan.directory / f"benchmark.{ending}", f"{text}\n".encode())
    return {"sweep_dir": str(plan.directory), "rows": found}


def benchmark_text(found: dict[str, Any]) -> str:
    """The table of a benchmark, and where its page is."""
    from shardwise.sweep.benchmark import measured_text

    return f"{measured_text(found['rows'])}\npage: {Path(found['sweep_dir']) / PAGE_FILE}"


def planned(
    path: str | Path | SweepConfig, overrides: Sequence[str] = (), number: int | None = None
) -> dict[str, Any]:
    """What `sweep` would do, checked as it checks; starts nothing. Raises ConfigError."""
    config = _prepared(path, overrides, number)
    places = slots.slots(config.slots)
    plan = make_plan(config, len(places[0].gpus or ()))
    asked = config.method.trials if isinstance(config.method, OptunaConfig) else 0
    return {
        "sweep_dir": str(plan.directory),
        "objective": str(plan.objective),
        "slots": [str(place) for place in places],
        "trials": [
            {
                "name": trial.name,
                "state": trial.status()[0],
                "point": trial.point,
                "ranks": trial.ranks,
                "command": command_of(config.recipe, trial),
            }
            for trial in plan.trials
        ],
        "impossible": {name: reason for name, (*_, reason) in plan.impossible.items()},
        "points_to_be_asked_for": max(asked - len(plan.numbers()), 0),
    }


def planned_text(found: dict[str, Any]) -> str:
    """The same for people: a line a trial."""
    lines = [f"{found['sweep_dir']}: {found['objective']}"]
    lines += [f"slot {i}: {place}" for i, place in enumerate(found["slots"])]
    for trial in found["trials"]:
        ranks = f"{trial['ranks']} rank{'s' if trial['ranks'] > 1 else ''}"
        lines.append(f"  {trial['name']}  {trial['state']}, {ranks}: {shown(trial['point'])}")
    for name, reason in found["impossible"].items():
        lines.append(f"  {name}  impossible: {reason}")
    if asked := found["points_to_be_asked_for"]:
        lines.append(f"  and {asked} points that Optuna will say")
    return "\n".join(lines)


def submit_array(
    path: str | Path | SweepConfig,
    profile: Path,
    overrides: Sequence[str] = (),
    nodes: int = 1,
    at_once: int | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Hand the trials that were not handed over before to Slurm, as one array.

    Each task runs on ``nodes`` nodes, ``at_once`` of them at a time. Slurm requeues what it stops;
    ``retry_failed`` hands failed and cancelled trials over again. ``dry_run``: render only.

    Raises ConfigError for what an array cannot do: Optuna and pruning, which need the sweep beside
    its trials, and a budget of hours or failures.
    """
    from shardwise.launch import cluster, slurm
    from shardwise.launch.profile import load_profile

    config = _prepared(path, overrides, None)
    _fits_an_array(config)
    site = load_profile(profile)
    config = config.model_copy(update={"ranks": nodes * site.ranks})
    with contextlib.nullcontext() if dry_run else _held(config.directory):
        plan = make_plan(config)
        left = [
            trial
            for trial in sorted(plan.trials, key=lambda t: t.order)
            if not trial.begun or (retry_failed and trial.status()[0] in ("open", "failed"))
        ][: config.budget.trials]
        if not left:
            raise UserError(f"{plan.directory}: every trial was handed over; --table shows them")
        jobs = [
            cluster.prepare(
                "slurm", config.recipe, override_words(t.overrides), nodes, site, str(profile)
            )
            for t in left
        ]
        job = dataclasses.replace(jobs[0], name=config.name)
        text = slurm.render(job, [one.task for one in jobs], at_once)
        found = {"submitted": text, "job": None, "trials": [trial.name for trial in left]}
        if dry_run:
            return found
        write_meaning(plan)
        for trial in left:
            trial.reopen() if trial.begun else trial.write()
        return {**found, "job": slurm.submit(job, text)}


def _fits_an_array(config: SweepConfig) -> None:
    if isinstance(config.method, OptunaConfig):
        raise ConfigError("method.kind: optuna asks as trials end; an array is known before")
    if config.pruner is not None:
        raise ConfigError("pruner: needs the sweep beside its trials; leave it out with --slurm")
    for key in ("hours", "failures"):
        if getattr(config.budget, key) is not None:
            raise ConfigError(f"budget.{key}: an array has no such end; leave it out with --slurm")


def tables(
    path: str | Path | SweepConfig, overrides: Sequence[str] = (), number: int | None = None
) -> dict[str, Any]:
    """Write a sweep's tables and page from its folders as they stand; starts nothing."""
    config = _prepared(path, overrides, number)
    plan = make_plan(config)
    return publish(plan, Reader(plan.objective).read(plan), over=True)


def table_text(table: dict[str, Any], most: int = 10) -> str:
    """The best points of a table, and where the rest is."""
    objective = table["objective"]
    counts = ", ".join(f"{n} {state}" for state, n in table["trials"].items())
    lines = [f"{table['name']}: {counts}"]
    lines.append(f"{objective['metric']} of {objective['stage']}, {objective['better']} is better")
    valued = [row for row in table["rows"] if row["value"] is not None]
    for row in valued[:most]:
        state = "" if row["state"] == "done" else f" ({row['state']})"
        name = name_of(row["number"], 0)
        lines.append(f"  {name}  {value_text(row)}{state}  {shown(row['point'])}")
    if len(valued) > most:
        lines.append(f"  and {len(valued) - most} more")
    return "\n".join([*lines, f"page: {Path(table['sweep_dir']) / PAGE_FILE}"])


def _prepared(
    path: str | Path | SweepConfig, overrides: Sequence[str], number: int | None
) -> SweepConfig:
    """The sweep of a file with what the command line says over it. Raises ConfigError."""
    config = path if isinstance(path, SweepConfig) else load_sweep(Path(path))
    config = with_words(config, overrides)
    if number is not None:
        said = config.slots.model_copy(update={"number": number})
        config = config.model_copy(update={"slots": said})
    return config


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """The sweep's folder is ours. Raises LockedError when another sweep lives there."""
    try:
        lock = RunLock(directory)
    except LockedError as error:
        text = str(error).replace("another run lives", "another sweep lives")
        text = text.replace("this one a run_dir", "this one a sweep_dir")
        raise LockedError(text) from error
    with lock:
        yield
