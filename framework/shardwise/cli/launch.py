"""`shardwise launch local`: what `train --nproc` does, and what it would do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli import complete
from shardwise.cli.output import JsonOption, NoVerify, emit, json_alone
from shardwise.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Start the ranks of a run.")


@app.callback()
def _group() -> None:
    """Keeps `local` a subcommand while it is the only one."""


@app.command()
def local(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[section.key=value]...",
            help="Over the recipe.",
            autocompletion=complete.overrides,
        ),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, metavar="N", help="Default: GPUs, or 1.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, show the ranks, start nothing.")
    ] = False,
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


def check_ranks(nproc: int | None) -> None:
    """Refuse to start ranks from within a rank."""
    world = os.environ.get("WORLD_SIZE")
    if nproc is not None and "RANK" in os.environ and str(nproc) != world:
        raise UserError(
            f"--nproc {nproc}: torchrun has started {world} ranks already; leave --nproc out"
        )
