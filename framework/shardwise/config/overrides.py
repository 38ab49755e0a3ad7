"""``section.key=value`` on top of a tree; values are YAML, a list takes an index or a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.config import yaml12
from shardwise.config.explain import nearest
from shardwise.config.source import Path, Problem, Source, Tree, dotted, shown
from shardwise.errors import ConfigError


def apply(tree: Tree, overrides: Sequence[str]) -> None:
    """Apply each override in order, in place; what cannot be applied joins ``tree.problems``."""
    for number, text in enumerate(overrides, start=1):
        source = Source("override", index=number)
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            tree.problems.append(
                Problem((), source, f"{text!r} is not of the form section.key=value")
            )
            continue
        try:
            parsed = yaml12.parse(value, key, source)
        except ConfigError as error:
            tree.problems.append(Problem((), source, str(error)))
            continue
        _set(tree, key.split("."), parsed, source)


def _set(tree: Tree, keys: Sequence[str], value: Tree, source: Source) -> None:
    """Put ``value`` at the end of ``keys``, making the mappings on the way that are missing."""
    if not isinstance(tree.data, dict):
        tree.data = {}
    node: Any = tree.data
    path: Path = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            index = _index(node, key)
            if index is None:
                names = [str(n) for n in map(_name, node) if n]
                tree.problems.append(
                    Problem(
                        (*path, key),
                        source,
                        f"no such item; {dotted(path)} "
                        + (f"has {len(node)} items, 0 to {len(node) - 1}" if node else "is empty")
                        + (f", named {', '.join(names)}" if names else "")
                        + nearest(key, names),
                    )
                )
                return
            step: str | int = index
        elif isinstance(node, dict):
            step = key
        else:
            tree.problems.append(
                Problem(path, source, f"is {shown(node)}: there is no {key!r} inside it")
            )
            return
        path = (*path, step)
        if last:
            _replace(tree, node, path, value, source)
        else:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
                tree.sources[path] = source
            node = node[step]


def _replace(tree: Tree, node: Any, path: Path, value: Tree, source: Source) -> None:
    for old in [p for p in tree.sources if p[: len(path)] == path]:
        del tree.sources[old]
    tree.problems = [p for p in tree.problems if p.path[: len(path)] != path or not path]
    tree.problems += [Problem((*path, *p.path), p.source, p.text) for p in value.problems]
    tree.sources.update({(*path, *inner): at for inner, at in value.sources.items()})
    tree.sources[path] = source
    if isinstance(node, list):
        tree.sources[path[:-1]] = source
    node[path[-1]] = value.data


def _name(item: Any) -> Any:
    return (item.get("name") or item.get("kind")) if isinstance(item, dict) else None


def _index(items: list[Any], key: str) -> int | None:
    """The item that ``key`` means: its number, or the only one of that name."""
    if key.isascii() and key.isdigit():
        return int(key) if len(key) < 10 and int(key) < len(items) else None
    named = [i for i, item in enumerate(items) if _name(item) == key]
    return named[0] if len(named) == 1 else None
