"""`shardwise config diff|explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardwise import terminal
from shardwise.cli import complete
from shardwise.cli.output import JsonOption, emit
from shardwise.errors import CheckFailed

if TYPE_CHECKING:
    from shardwise.config.reference import Block, Key

app = typer.Typer(no_args_is_help=True, help="Look at recipes and presets, and what keys mean.")
Side = Annotated[str, typer.Argument(help="A recipe, a run's folder or a preset (dpo:dpo_paper).")]


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


@app.command()
def explain(
    key: Annotated[
        str,
        typer.Argument(help="As in a recipe, e.g. stages.sft.batch.", autocompletion=complete.keys),
    ] = "",
    json: JsonOption = None,
) -> None:
    """What a key of a recipe means: type, default, an example; of a section, its keys."""
    from shardwise.config.reference import find

    found, block = find(key)
    text = "\n".join([*_told(key, found, block), *(_held(block) if block else ())])
    emit({"key": found, "section": block}, text, json)


def _told(path: str, key: Key | None, block: Block | None) -> list[str]:
    meaning = key.meaning if key else block.meaning if block else ""
    lines = [f"{path}: {meaning}" if path else meaning]
    if key is not None:
        default = "none, it is required" if key.default is None else key.default
        lines += [f"  type     {key.type}"]
        lines += [f"  default  {default}"] if default else []
        lines += ["  example  " + key.example.replace("\n", "\n           ")]
    return lines


def _held(block: Block) -> list[str]:
    rows = [(key.name, key.default, key.meaning) for key in block.keys]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"  kinds    {', '.join(block.kinds)}"] if block.kinds else []
    lines += [f"  keys     {len(rows)}" + (", of all kinds" if block.kinds else "")]
    for name, default, meaning in rows:
        value = "(required)" if default is None else f"({default})" if default else ""
        lines.append(f"    {name:<{width}}  {meaning} {value}".rstrip())
    return lines
