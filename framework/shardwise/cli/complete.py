"""What the shell may offer: keys of recipes, stages, layouts. No torch, and never an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from shardwise.errors import UserError
from shardwise.parallel.layout import CP_KINDS, SCHEDULES

_AXES = ("dp", "tp", "pp", "cp")
_SIZES = (2, 4, 8)


def quiet(offer: Callable[..., Iterator[str]]) -> Callable[[typer.Context, str], list[str]]:
    """``offer`` as typer calls it: what begins with what is typed, and nothing where it fails."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            return [word for word in offer(ctx, incomplete) if word.startswith(incomplete)]
        except (UserError, OSError):
            return []

    return complete


def _keys(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    yield from _known(incomplete)


def _known(incomplete: str) -> dict[str, bool]:
    """Paths one part longer than what is whole of this one, and whether each holds more."""
    from shardwise.config.reference import find

    above, dot, _ = incomplete.rpartition(".")
    _, block = find(above)
    if block is None:
        return {}
    names = dict.fromkeys(block.kinds, True) | {key.name: bool(key.section) for key in block.keys}
    return {f"{above}{dot}{name}": more for name, more in names.items()}


def _overrides(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Of the recipe that stands before: stages by name, then keys, then values."""
    from shardwise.config.reference import find

    key, equals, _ = incomplete.partition("=")
    kinds = _stages_of(ctx)
    named = re.match(r"stages\.([^.]+)\.", incomplete)
    kind = kinds.get(named[1], named[1]) if named else ""
    if equals:
        found, _ = find(re.sub(r"^stages\.[^.]+", f"stages.{kind}", key))
        words = found.type.removesuffix(" or null").removeprefix("one of ") if found else ""
        choices = ["true", "false"] if words == "true or false" else words.split(", ")
        yield from (f"{key}={choice}" for choice in choices if " " not in choice)
    elif incomplete.startswith("stages.") and not named:
        yield from (f"stages.{name}." for name in kinds)
    else:
        begin = f"stages.{named[1]}." if named else ""
        typed = f"stages.{kind}." + incomplete[len(begin) :] if named else incomplete
        for path, more in _known(typed).items():
            shown = begin + path.removeprefix(f"stages.{kind}.") if named else path
            yield f"{shown}{'.' if more else '='}"


def _stages_of(ctx: typer.Context) -> dict[str, str]:
    """Kinds by name, of the recipe that the command line names."""
    from shardwise.config import yaml12

    # Before an option's value the arguments are not told apart yet.
    path = Path(str(ctx.params.get("config") or next(iter(ctx.args), "")))
    data: Any = yaml12.parse(path.read_text(encoding="utf-8"), str(path)).data
    stages = data.get("stages", []) if isinstance(data, dict) else []
    return {str(s.get("name", s.get("kind"))): str(s.get("kind")) for s in stages}


def _stages(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    yield from _stages_of(ctx)


def _layouts(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    above, dot, _ = incomplete.rpartition(".")
    used = {re.sub(r"\d+$", "", word) for word in above.split(".")}
    words = [f"{axis}{size}" for axis in _AXES if axis not in used for size in _SIZES]
    words += [] if "zero" in used else [f"zero{stage}" for stage in range(4)]
    words += ["hsdp2"] if "dp" in used - {"hsdp"} else []
    words += ["sp"] if "tp" in used and "sp" not in used else []
    words += [*SCHEDULES, "v2"] if "pp" in used and not used & set(SCHEDULES) else []
    words += CP_KINDS if "cp" in used and not used & set(CP_KINDS) else []
    words += [] if above else ["auto", "suite"]
    yield from (f"{above}{dot}{word}" for word in words)


def _engines(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    from shardwise.config import registry

    registry.discover()
    yield from registry.ENGINE_CONFIGS


def among(*words: str) -> Callable[[typer.Context, str], list[str]]:
    """One of a few words."""
    return quiet(lambda ctx, incomplete: iter(words))


keys, overrides, stages = quiet(_keys), quiet(_overrides), quiet(_stages)
layouts, engines = quiet(_layouts), quiet(_engines)
