"""Where a value came from, and plain data that remembers it for every place inside."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of one value: the schema's default, a line of a file, an override, a caller.

    Or what a recipe starts from (``file``).
    """

    kind: Literal["default", "file", "override", "call", "start"] = "default"
    file: str | None = None
    line: int | None = None
    index: int | None = None  # of the override on the command line, from 1

    def __str__(self) -> str:
        match self.kind:
            case "file":
                return f"{self.file}:{self.line}"
            case "override":
                return f"command line override {self.index}"
            case "call":
                return "given by the caller"
            case "start":
                return f"init_from: {self.file}"
        return "default"


def places(data: Any, path: Path, source: Source) -> dict[Path, Source]:
    """``source`` for ``path``, where ``data`` stands, and for every place inside of it."""
    items: Any = ()
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
    found = {path: source}
    for key, value in items:
        found |= places(value, (*path, key), source)
    return found


@dataclasses.dataclass
class Tree:
    """Plain data (dict, list, scalars), the source of every place, and the problems met so far."""

    data: Any
    sources: dict[Path, Source]
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def source(self, path: Path) -> Source:
        """The source of ``path``, or of the nearest place above it that has one."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.sources:
                return self.sources[path[:end]]
        return Source()


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: where, from where, and what about it."""

    path: Path
    source: Source
    text: str

    def __str__(self) -> str:
        where = f"{dotted(self.path)} ({self.source})" if self.path else str(self.source)
        return f"{where}: {self.text}"


def dotted(path: Path) -> str:
    """``("stages", 0, "steps")`` as ``stages.0.steps``."""
    return ".".join(str(part) for part in path)


def get(data: Any, path: Path) -> Any:
    """The value at ``path``, or None where there is none."""
    for part in path:
        if (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and -1 < part < len(data)
        ):
            data = data[part]  # type: ignore[index]
        else:
            return None
    return data


def shown(value: Any) -> str:
    """A value as a message shows it, with its type in words."""
    match value:
        case None:
            return "null (nothing)"
        case bool():
            return f"{str(value).lower()} (a boolean)"
        case int() | float():
            return f"{value!r} (a number)"
        case str():
            text = value if len(value) <= 60 else value[:57] + "..."
            return f"{text!r} (text)"
        case list():
            return f"a list of {len(value)}"
    return f"a mapping of {len(value)}"
