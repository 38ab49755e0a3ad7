"""What a job writes and another one reads: ``from: <job>.<artifact>`` in place of a path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from shardwise.config.section import Section

ArtifactName = Annotated[
    str | None,
    Field(
        alias="from",
        pattern=r"^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+$",
        description="in place of a path: what an earlier job writes, as job.artifact",
        examples=["search.sft"],
        json_schema_extra={"beside": {"path": None}},
    ),
]
S = TypeVar("S", bound=Section)


def artifacts_of(section: Any, key: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """(key, section) of every section inside that reads what a job writes."""
    if isinstance(section, Section):
        if getattr(section, "from_", None) is not None:
            yield key, section
        for name in type(section).model_fields:
            yield from artifacts_of(getattr(section, name), (*key, name))
    elif isinstance(section, list | tuple):
        for i, item in enumerate(section):
            yield from artifacts_of(item, (*key, i))


def resolved(section: S, written: Mapping[str, Path]) -> S:
    """The same with the paths of artifacts beside their names; ``written``: where they are."""
    found: S = _mapped(section, lambda name: {"path": written[name]})
    return found


def without_names(section: S) -> S:
    """What `resolved` gave, as if the paths had been written in a recipe."""
    found: S = _mapped(section, lambda name: {"from_": None})
    return found


def _mapped(value: Any, change: Callable[[str], dict[str, Any]]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    if not isinstance(value, Section):
        return value
    updates = {n: _mapped(getattr(value, n), change) for n in type(value).model_fields}
    if updates.get("from_") is not None:
        updates |= change(updates["from_"])
    changed = {n: v for n, v in updates.items() if v is not getattr(value, n)}
    return value.model_copy(update=changed) if changed else value
