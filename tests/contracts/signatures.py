"""The recorded signatures of optional libraries, as callables that accept what a release does."""

from __future__ import annotations

import ast
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@functools.cache
def _data(library: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((HERE / f"{library}.json").read_text(encoding="utf-8"))
    return data


def versions(library: str) -> list[str]:
    """The releases that we support, oldest first."""
    return list(_data(library)["versions"])


def groups(library: str) -> list[str]:
    """One release for each set of signatures that differs from the one before it: the newest."""
    found: dict[str, str] = {}
    for version in versions(library):
        rows = [rows for c in _data(library)["calls"] for rows in [_row(library, c, version)]]
        found[json.dumps(rows)] = version
    return list(found.values())


def names(library: str, version: str) -> list[str]:
    """The calls that a release offers."""
    return [c for c in _data(library)["calls"] if _row(library, c, version) is not None]


def _row(library: str, call: str, version: str) -> list[dict[str, str]] | None:
    rows = _data(library)["calls"][call]
    return next((r["parameters"] for r in rows if version in r["versions"]), None)


def signature(library: str, call: str, version: str) -> inspect.Signature:
    """Of a call in a release. Raises KeyError where it has none."""
    rows = _row(library, call, version)
    if rows is None:
        raise KeyError(f"{call} does not exist in {library} {version}")
    return inspect.Signature(
        [
            inspect.Parameter(
                r["name"],
                getattr(inspect.Parameter, r["kind"].upper()),
                default=_value(r["default"]) if "default" in r else inspect.Parameter.empty,
            )
            for r in rows
        ]
    )


def members(library: str, call: str, version: str) -> list[str]:
    """The names in an enum of a release."""
    return [r["name"] for r in _row(library, call, version) or []]


def _value(source: str) -> Any:
    """A default, where it is a plain one; else its source text."""
    try:
        return ast.literal_eval(source)
    except ValueError:
        return source


def checked(library: str, call: str, version: str, compute: Callable[..., Any]) -> Any:
    """``compute(name=value, ...)`` behind that release's signature, defaults filled in.

    A call that the release would refuse raises TypeError.
    """
    accepts = signature(library, call, version)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = accepts.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{call} of {library} {version}: {error}") from error
        bound.apply_defaults()
        return compute(**bound.arguments)

    return run
