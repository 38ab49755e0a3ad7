"""`shardwise sweep`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli import complete
from shardwise.cli.output import JsonOption, NoVerify, emit


def sweep(
    config: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[section.key=value]...",
            help="Over the recipe, of all trials.",
            autocompletion=complete.keys,
        ),
    ] = None,
    slots: Annotated[
        int | None, typer.Option("--slots", min=1, metavar="N", help="Trials at a time.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every trial, show them, start nothing.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Write the tables and the page again; start nothing.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run failed trials again, too.")
    ] = False,
    benchmark: Annotated[
        bool,
        typer.Option("--benchmark", help="Time each point's steps, in turns, undisturbed."),
    ] = False,
    slurm: Annotated[
        Path | None,
        typer.Option("--slurm", metavar="PROFILE", help="Submit the trials as an array of jobs."),
    ] = None,
    nodes: Annotated[
        int, typer.Option("--nodes", min=1, metavar="N", help="Of each job of the array.")
    ] = 1,
    no_verify: NoVerify = False,
    json: JsonOption = None,
) -> None:
    """Run many trials of a recipe and compare them. Goes on where it was stopped."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from shardwise.sweep import api

    words = overrides or ()
    if benchmark:
        timed = api.benchmark(config, words)
        emit(timed, api.benchmark_text(timed), json)
        return
    if slurm is not None:
        handed = api.submit_array(config, slurm, words, nodes, slots, retry_failed, dry_run)
        told = f"slurm job {handed['job']}: {len(handed['trials'])} trials; --table shows them"
        emit(handed, handed["submitted"].rstrip("\n") if dry_run else told, json)
        return
    if dry_run:
        planned = api.planned(config, words, slots)
        emit(planned, api.planned_text(planned), json)
        return
    if table:
        found = api.tables(config, words, slots)
    else:
        found = api.sweep(config, words, slots, retry_failed)
    emit(found, api.table_text(found), json)
