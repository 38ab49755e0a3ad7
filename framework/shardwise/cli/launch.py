"""`shardwise launch`: start a run on this machine, or hand it to a cluster's scheduler."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli import complete
from shardwise.cli.output import JsonOption, NoVerify, emit, json_alone
from shardwise.errors import CheckFailed, ConfigError, ExitCode, UserError

app = typer.Typer(no_args_is_help=True, help="Start a run here, or on a cluster.")
profiles = typer.Typer(no_args_is_help=True, help="The profile of a cluster.")
app.add_typer(profiles, name="profile")

Recipe = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value]...",
        help="Over the recipe.",
        autocompletion=complete.overrides,
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe, print what would be done, do nothing.")
]


@app.command()
def local(
    config: Recipe,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, metavar="N", help="Default: GPUs, or 1.")
    ] = None,
    dry_run: DryRun = False,
    no_verify: NoVerify = False,
    json: JsonOption = None,
) -> None:
    """Run a recipe on N processes of this machine."""
    check_ranks(nproc)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from shardwise.launch.plan import default_nproc, plan_local
    from shardwise.launch.train import train

    nproc = nproc or default_nproc()
    if dry_run:
        plan = plan_local(config, overrides or (), nproc)
        lines = [f"{plan['run_dir']}: {plan['nproc']} ranks, logs in {plan['logs']}"]
        lines += [f"  {stage['name']}: {stage['layout']}" for stage in plan["stages"]]
        lines += [f"  {key}={value}" for key, value in plan["environment"].items()]
        emit(plan, "\n".join(lines), json)
        return
    with json_alone(json):
        summary = train(config, overrides or (), nproc)
    if json is not None:
        emit(summary, "", json)


def _on_cluster(target: str, words: str) -> None:
    """The command ``launch TARGET``, alike for all schedulers."""

    def command(
        config: Recipe,
        overrides: Overrides = None,
        nodes: Annotated[
            int, typer.Option("--nodes", metavar="N", help="How many; each with the same ranks.")
        ] = 1,
        profile: Annotated[
            Path | None,
            typer.Option(
                "--profile", metavar="P", help="The cluster's; default: $SHARDWISE_CLUSTER."
            ),
        ] = None,
        dry_run: DryRun = False,
        json: JsonOption = None,
    ) -> None:
        from shardwise.launch.cluster import prepare
        from shardwise.launch.profile import find_profile, load_profile

        path = find_profile(profile)
        job = prepare(target, config, overrides or (), nodes, load_profile(path), str(path))
        scheduler = importlib.import_module(f"shardwise.launch.{target}")
        text: str = scheduler.render(job)
        result = {"target": target, "run_dir": job.task.run_dir, "submitted": text, "job": None}
        if dry_run:
            emit(result, text.rstrip("\n"), json)
            return
        id = scheduler.submit(job, text)
        told = f"{target} job {id}: {nodes} x {job.ranks} ranks; `shardwise launch status "
        emit({**result, "job": id}, f"{told}{job.task.run_dir}`", json)

    command.__doc__ = words
    app.command(target)(command)


_on_cluster("slurm", "Submit a recipe to Slurm: a batch script with one torchrun agent a node.")
_on_cluster("kubernetes", "Submit a recipe to Kubernetes: a TrainJob, or a plain JobSet.")
_on_cluster("skypilot", "Submit a recipe to SkyPilot as a managed job.")


@profiles.command()
def check(
    profile: Annotated[
        Path | None,
        typer.Argument(metavar="PROFILE", help="A YAML file; default: $SHARDWISE_CLUSTER."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Say what a cluster's profile lacks here; exit code 1 if anything is missing."""
    from shardwise.launch.profile import find_profile, load_profile, missing
    from shardwise.launch.slurm import check_nodes

    path = find_profile(profile)
    found = missing(cluster := load_profile(path))
    try:
        if cluster.slurm:
            check_nodes(cluster.slurm)
    except ConfigError as error:
        found.append(str(error))
    result = {"profile": path, "missing": found}
    if not found:
        emit(result, f"{path}: nothing is missing", json)
        return
    emit(result, "", json) if json else None
    raise CheckFailed("\n  ".join([f"{path}: things are missing: {len(found)}", *found]))


@app.command()
def decide(
    run: Run,
    code: Annotated[int, typer.Option("--code", metavar="N", help="Exit code of the agents.")],
    json: JsonOption = None,
) -> None:
    """Say whether to start a run once more after an attempt: exit code 85, else the run's own.

    For batch scripts.
    """
    from shardwise.launch.decide import decide as ask

    found = ask(run, code)
    emit(found, f"{found.action}: {found.reason}", json)
    raise typer.Exit(found.exit_code)


@app.command()
def status(run: Run, json: JsonOption = None) -> None:
    """Show a run's attempts, steps and goodput, from its folder alone."""
    from shardwise.launch.status import as_text
    from shardwise.launch.status import status as ask

    found = ask(run)
    emit(found, as_text(found), json)


def check_ranks(nproc: int | None) -> None:
    """Refuse to start ranks from within a rank."""
    world = os.environ.get("WORLD_SIZE")
    if nproc is not None and "RANK" in os.environ and str(nproc) != world:
        raise UserError(
            f"--nproc {nproc}: torchrun has started {world} ranks already; leave --nproc out"
        )


def preflight(
    config: Path | None,
    overrides: Sequence[str],
    nproc: int | None,
    seconds: float,
    min_bandwidth: float,
    json: str | None,
) -> None:
    """`doctor --cluster`: rank 0 tells, and every rank ends with the same exit code."""
    check_ranks(nproc)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from shardwise.launch.preflight.api import as_text, cluster
    from shardwise.resilience.attempts import refused

    with json_alone(json):
        found = cluster(config, overrides, nproc, seconds, min_bandwidth)
    if os.environ.get("RANK", "0") == "0":
        emit(found, as_text(found), json)
        if not found["ok"]:
            told = "before step 1: " + "; ".join(p["sentence"] for p in found["failures"])
            refused(ExitCode.USAGE if found["bad_input"] else ExitCode.FAILED, told)
    if not found["ok"]:
        raise typer.Exit(ExitCode.FAILED)
