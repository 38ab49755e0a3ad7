"""A recipe as text: plain data as YAML, with a comment for every choice."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from shardwise import terminal
from shardwise.config import yaml12

WIDTH = 100  # columns of a comment
INLINE = 92  # of a mapping that stands on one line
SHOWN = 60  # of a value on a terminal

Keys = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value that was chosen, where it goes, and why."""

    keys: Keys
    value: Any
    why: str

    @property
    def name(self) -> str:
        """Its key as an override spells it."""
        return ".".join(map(str, self.keys))

    @property
    def line(self) -> str:
        """For a terminal; a long value stands in the recipe alone."""
        value = yaml12.inline(self.value)
        shown = f" {value}:" if len(value) <= SHOWN else ""
        return f"{self.name}:{shown} {self.why}"


def as_tree(choices: Sequence[Choice]) -> dict[str, Any]:
    """The choices as one mapping, in their order; a number in ``keys`` is a place in a list."""
    root: dict[str, Any] = {}
    for choice in choices:
        node: Any = root
        for key, following in zip(choice.keys, choice.keys[1:]):
            fresh: Any = [] if isinstance(following, int) else {}
            node = _entered(node, key, fresh)
        _entered(node, choice.keys[-1], choice.value)
    return root


def _entered(node: Any, key: str | int, value: Any) -> Any:
    if isinstance(node, list):
        assert isinstance(key, int) and key <= len(node)
        if key == len(node):
            node.append(value)
        return node[key]
    return node.setdefault(key, value)


def as_yaml(choices: Sequence[Choice], head: str) -> str:
    """The recipe: ``head`` as a comment, then the choices with theirs.

    A mapping that is short and flat stands on one line, behind the comments of all that is in it.
    """
    why = {choice.keys: choice.why for choice in choices if choice.why}
    lines = [line for part in head.split("\n") for line in _comment("", part)]
    for key, value in as_tree(choices).items():
        lines += _entry(key, value, (key,), "", why)
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, keys: Keys, indent: str, why: dict[Keys, str]) -> list[str]:
    lines = []
    inline = f"{indent}{yaml12.inline({key: value})[1:-1]}"
    nested = isinstance(value, dict | list) and value
    if not nested or (_flat(value) and len(inline) <= INLINE):
        for inner, text in why.items():
            if inner[: len(keys)] == keys:
                label = ".".join(map(str, inner[len(keys) - 1 :]))
                lines += _comment(indent, f"{label}: {text}")
        return [*lines, inline]
    if keys in why:
        lines += _comment(indent, f"{key}: {why[keys]}")
    lines.append(f"{indent}{yaml12.inline(key)}:")
    if isinstance(value, dict):
        for name, inner in value.items():
            lines += _entry(name, inner, (*keys, name), indent + "  ", why)
        return lines
    for i, item in enumerate(value):
        lines += _item(item, (*keys, i), indent + "  ", why)
    return lines


def _item(item: Any, keys: Keys, indent: str, why: dict[Keys, str]) -> list[str]:
    """An item of a list, whose first key stands behind the dash."""
    if not isinstance(item, dict) or not item:
        return [f"{indent}- {yaml12.inline(item)}"]
    inner: list[str] = []
    for name, value in item.items():
        inner += _entry(name, value, (*keys, name), indent + "  ", why)
    first = next(i for i, line in enumerate(inner) if not line.lstrip().startswith("#"))
    comments = [line[2:] for line in inner[:first]]  # in line with the dash
    return [*comments, f"{indent}- {inner[first].lstrip()}", *inner[first + 1 :]]


def _flat(value: Any, depth: int = 0) -> bool:
    """Whether nothing in it is nested deeper than a list of mappings of plain values."""
    if isinstance(value, dict):
        return depth < 3 and all(_flat(v, depth + 1) for v in value.values())
    if isinstance(value, list):
        return depth < 2 and all(_flat(v, depth + 1) for v in value)
    return True


def _comment(indent: str, text: str) -> list[str]:
    room = WIDTH - len(indent) - 2
    wrapped = textwrap.wrap(terminal.one_line(text), room, break_long_words=False)
    return [f"{indent}# {line}" for line in wrapped or [""]]
