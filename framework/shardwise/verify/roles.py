"""Layouts of a stage with several models: ``--layout actor=tp2@0-1,critic=dp2.zero2@2-3``.

Without a role's name a layout is every role's. Roles that are not named are data parallel. Ranks
behind ``@`` place a role on some ranks of the world; without them it is on all.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from shardwise.config.schema import RoleConfig, StageConfig
from shardwise.errors import UserError
from shardwise.parallel import layout as grammar
from shardwise.parallel.layout import Layout, parse_layout


@dataclasses.dataclass(frozen=True)
class Placing:
    """One role's layout and ranks; the empty role stands for all."""

    role: str
    layout: str
    ranks: tuple[int, ...] | None = None

    def __str__(self) -> str:
        place = "" if self.ranks is None else f"@{self.ranks[0]}-{self.ranks[-1]}"
        return f"{self.role}={self.layout}{place}" if self.role else self.layout


def parse(text: str) -> list[Placing]:
    """See the module. Raises UserError for what it is not."""
    if "=" not in text:
        return [Placing("", text)]
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=([\w.]+?)(?:@(\d+)(?:-(\d+))?)?", part.strip())
        if match is None:
            raise UserError(
                f"--layout {text}: {part!r} is no role's layout; write actor=tp2, or actor=tp2@0-1"
            )
        role, layout, first, last = match.groups()
        ranks = None
        if first is not None:
            ranks = tuple(range(int(first), int(last or first) + 1))
            if len(ranks) != grammar.world_of(layout):
                raise UserError(
                    f"--layout {text}: {layout} needs {grammar.world_of(layout)} ranks, "
                    f"{part!r} gives it {len(ranks)}"
                )
        found.append(Placing(role, layout, ranks))
    return found


def world_of(text: str) -> int:
    """Ranks that a layout, or layouts by role, ask for."""
    return max(p.ranks[-1] + 1 if p.ranks else grammar.world_of(p.layout) for p in parse(text))


def layouts_of(text: str) -> list[Layout]:
    """The parsed layouts in it."""
    world = world_of(text)
    return [parse_layout(p.layout, len(p.ranks) if p.ranks else world) for p in parse(text)]


def with_layouts(stage: StageConfig, text: str, **engine: Any) -> StageConfig:
    """The stage under these layouts, with further keys of every role's engine replaced."""
    placings = parse(text)
    whole = next((p.layout for p in placings if not p.role), f"dp{world_of(text)}.zero0")
    base = stage.engine.model_copy(update={**engine, "layout": whole})
    updates: dict[str, Any] = {"engine": base}
    named = [p for p in placings if p.role]
    roles: Any = getattr(stage, "roles", None)
    if roles is not None:
        known = type(roles).model_fields
        for p in named:
            if p.role not in known:
                raise UserError(
                    f"--layout {text}: stage {stage.name} has no role {p.role}; "
                    f"known: {', '.join(known)}"
                )
        updates["roles"] = type(roles)().model_copy(
            update={
                p.role: RoleConfig(
                    engine=base.model_copy(update={"layout": p.layout}),
                    ranks=None if p.ranks is None else list(p.ranks),
                )
                for p in named
            }
        )
    elif named:
        raise UserError(f"--layout {text}: stage {stage.name} has one model; give one layout")
    return stage.model_copy(update=updates)


def parts_of(text: str) -> list[str]:
    """Each role's layout alone, where there are several."""
    placings = parse(text)
    return [str(p) for p in placings] if len(placings) > 1 else []
