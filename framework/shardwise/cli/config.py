"""`shardwise config diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwise import terminal
from shardwise.cli.output import JsonOption, emit
from shardwise.errors import CheckFailed

app = typer.Typer(no_args_is_help=True, help="Look at recipes and presets.")
Side = Annotated[str, typer.Argument(help="A recipe, a run's folder or a preset (dpo:dpo_paper).")]


@app.callback()
def _group() -> None:
    """Look at recipes and presets."""


@app.command()
def diff(a: Side, b: Side, json: JsonOption = None) -> None:
    """In what two recipes, runs or presets differ, defaults included; exit code 1 if they do."""
    from shardwise.launch.config_diff import config_diff

    found = config_diff(a, b)
    result = {"values": found.values, "sources": found.sources}
    if not found.values:
        emit(result, "\n".join([*found.sources, "equal"]), json)
        return
    if json is not None:
        emit(result, "", json)
    lines = [terminal.one_line(line) for line in found.lines()]
    raise CheckFailed("\n  ".join([f"{a} and {b} differ", *lines]))
