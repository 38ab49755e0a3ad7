"""In what mappings differ, value by value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def differences(*sides: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The keys whose values are not all equal, to the value of each side; None: not there."""
    keys = dict.fromkeys(key for side in sides for key in side)
    found = {key: tuple(side.get(key) for side in sides) for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def leaves(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value under its dotted key; items of a list that have names go by them."""
    items: list[tuple[str, Any]] = []
    if isinstance(data, dict):
        items = list(data.items())
    elif isinstance(data, list) and any(isinstance(item, dict) for item in data):
        items = [(_name(item, i), item) for i, item in enumerate(data)]
    if not items:
        yield key, data
    for name, value in items:
        yield from leaves(value, f"{key}.{name}" if key else str(name))


def _name(item: Any, index: int) -> str:
    return str(item.get("name") or index) if isinstance(item, dict) else str(index)
