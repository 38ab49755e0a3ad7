"""Layouts of a stage with several models: ``--layout actor=tp2@0-1,critic=dp2.zero2@2-3``.

Without a role's name a layout is every role's. Roles that are not named are data parallel. Ranks
behind ``@`` place a role on some ranks of the world; without them it is on all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from shardwise.config.schema import EngineConfig, JobConfig, RoleConfig, StageConfig
from shardwise.errors import UserError
from shardwise.parallel import layout as grammar
from shardwise.parallel.layout import Layout, parse_layout
from shardwise.rollout.config import RolloutConfig
from shardwise.stages.arithmetic import roles_in_use
from shardwise.stages.base import ACTOR, role_of, roles_of

J = TypeVar("J", bound=JobConfig)


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


def with_layouts(stage: J, text: str, **engine: Any) -> J:
    """The stage under these layouts, with further keys of every role's engine replaced."""
    placings = parse(text)
    whole = next((p.layout for p in placings if not p.role), f"dp{world_of(text)}.zero0")
    base = _with_keys(stage.engine, {**engine, "layout": whole})
    updates: dict[str, Any] = {"engine": base}
    if isinstance(rollout := getattr(stage, "rollout", None), RolloutConfig):
        updates["rollout"] = rollout.on(world_of(text))
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
        by_role = {p.role: p for p in named}
        found = {}
        for role in known:
            said, placing = getattr(roles, role), by_role.get(role)
            if said is not None or placing is not None:
                own = base if said is None else _with_keys(said.engine, engine)
                own = own.model_copy(update={"layout": placing.layout if placing else whole})
                ranks = list(placing.ranks) if placing and placing.ranks else None
                laid_out = {"engine": own, "ranks": ranks, "init_from": None}
                found[role] = (said or RoleConfig()).model_copy(update=laid_out)
        updates["roles"] = type(roles)().model_copy(update=found)
    elif named:
        raise UserError(f"--layout {text}: stage {stage.name} has one model; give one layout")
    return stage.model_copy(update=updates)


def _with_keys(engine: EngineConfig, updates: Mapping[str, Any]) -> EngineConfig:
    """An engine, as it is verified, with those keys replaced that its kind has."""
    engine = engine.for_verify()
    own = {key: value for key, value in updates.items() if key in type(engine).model_fields}
    return engine.model_copy(update=own)


def with_engines(
    stage: StageConfig, change: Callable[[EngineConfig, str], EngineConfig]
) -> StageConfig:
    """The stage with what ``change`` makes of its engine, and of each role's, given its name."""
    updates: dict[str, Any] = {"engine": change(stage.engine, ACTOR)}
    if hasattr(stage, "roles"):
        said = {role: role_of(stage, role) for role in roles_of(stage)}
        roles = {
            role: config.model_copy(update={"engine": change(config.engine, role)})
            for role, config in said.items()
        }
        updates["roles"] = type(stage.roles)().model_copy(update=roles)
    return stage.model_copy(update=updates)


def own_layouts(stage: JobConfig) -> str:
    """The layouts that the recipe itself gives the stage's models, as ``--layout`` takes them.

    Raises UserError where that leaves the number of ranks open.
    """
    said = {role: role_of(stage, role) for role in roles_in_use(stage)}
    if any(r.engine.layout == "auto" for r in said.values()):
        raise UserError(
            f"stage {stage.name} has engine.layout auto, which any number of ranks can be; "
            "say which with --layout, for example --layout dp2.zero2"
        )
    if all(r.ranks is None and r.engine.layout == stage.engine.layout for r in said.values()):
        return stage.engine.layout
    for role, r in said.items():
        if r.ranks is not None and len(r.ranks) != r.ranks[-1] - r.ranks[0] + 1:
            raise UserError(
                f"stages.{stage.name}.roles.{role}.ranks {r.ranks} have gaps; verify places a "
                f"role on neighbouring ranks, as in --layout {role}={r.engine.layout}@0-1"
            )
    placings = [
        Placing(role, r.engine.layout, None if r.ranks is None else tuple(r.ranks))
        for role, r in said.items()
    ]
    return ",".join(map(str, placings))


def parts_of(text: str) -> list[str]:
    """Each role's layout alone, where there are several."""
    placings = parse(text)
    return [str(p) for p in placings] if len(placings) > 1 else []
