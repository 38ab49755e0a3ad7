"""Pydantic's errors as sentences: what was given, what is allowed, the nearest name."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from shardwise.config import registry
from shardwise.config.adapters import AdapterConfig
from shardwise.config.callbacks import CallbackConfig
from shardwise.config.optimizers import OptimizerConfig
from shardwise.config.schema import (
    EngineConfig,
    EvaluationConfig,
    JobConfig,
    ModelConfig,
    Section,
)
from shardwise.config.source import Path, Problem, Tree, get, shown

_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    FilePath: "a path",
    type(None): "null",
    Any: "any value",
}
# Key, classes, and what a section is that names none.
REGISTERED: dict[Any, tuple[str, Mapping[str, Any], str | None]] = {
    ModelConfig: ("family", registry.MODEL_CONFIGS, None),
    AdapterConfig: ("kind", registry.ADAPTER_CONFIGS, None),
    EngineConfig: ("kind", registry.ENGINE_CONFIGS, registry.DEFAULT_ENGINE),
    OptimizerConfig: ("kind", registry.OPTIMIZER_CONFIGS, registry.DEFAULT_OPTIMIZER),
    JobConfig: ("kind", registry.STAGE_CONFIGS, None),
    CallbackConfig: ("kind", registry.CALLBACK_CONFIGS, None),
    EvaluationConfig: ("kind", registry.EVALUATION_CONFIGS, None),
}
_BOUNDS = {
    "ge": "at least",
    "gt": "above",
    "le": "at most",
    "lt": "below",
    "multiple_of": "a multiple of",
    "min_length": "of length at least",
    "max_length": "of length at most",
    "pattern": "matching",
}


_OR_START = "; or say in init_from which model to start from: then it is known"


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing when no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def explain(error: ValidationError, tree: Tree, root: type[Section]) -> list[Problem]:
    """One problem for each place that is wrong, in the order of the schema."""
    found: dict[Path, dict[str, None]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "default_factory_not_called":
            continue  # its default depends on a value that has its own error
        path, allowed = _locate(item["loc"], item["type"], tree.data, root)
        if item["type"].startswith("union_tag"):
            path = (*path, item["ctx"]["discriminator"].strip("'"))
        found.setdefault(path, {})[_sentence(item, path, allowed)] = None
    return [
        Problem(path, tree.source(path), "; or: ".join(sentences))
        for path, sentences in found.items()
    ]


def _sentence(item: Mapping[str, Any], path: Path, allowed: Any) -> str:
    given = item["input"]
    ctx = item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden":
            known = list(allowed) if isinstance(allowed, dict) else []
            guess = nearest(str(path[-1]), known) or ";"
            return f"unknown key{guess} known keys: {', '.join(known)}"
        case "missing":
            hint = _OR_START if path == ("model",) else ""
            return f"this key is required; allowed: {describe(allowed)}{hint}"
        case "unknown_name":
            hint = _OR_START if given is None and path == ("model", "family") else ""
            return _one_of(given, ctx["known"].split(", ")) + hint
        case "union_tag_invalid":
            return _one_of(given.get(path[-1]), ctx["expected_tags"].replace("'", "").split(", "))
        case "union_tag_not_found":
            return _one_of(None, [tag for m in alternatives(allowed) for tag in tags(m)])
        case "value_error" | "assertion_error":
            return str(ctx.get("error", item["msg"]))
    words = describe(allowed) if allowed is not None else ""
    named = choices(allowed)
    hint = _hint(given, words)
    if not hint and isinstance(given, str):
        hint = nearest(given, named)
    return f"given {shown(given)}; allowed: {words or item['msg']}{hint}"


def _one_of(given: Any, known: list[str]) -> str:
    what = "this key is required" if given is None else f"given {shown(given)}"
    guess = nearest(given, known) if isinstance(given, str) else ""
    return f"{what}; allowed: one of {', '.join(known)}{guess}"


def _hint(given: Any, words: str) -> str:
    """The mend for text where a number or a boolean was meant."""
    if not isinstance(given, str):
        return ""
    low = given.lower()
    if "true or false" in words:
        if low in ("yes", "on", "y", "true"):
            return "; write true"
        if low in ("no", "off", "n", "false"):
            return "; write false"
    if "number" not in words and "integer" not in words:
        return ""
    try:
        float(given)
    except ValueError:
        return ""
    plain = given.replace("_", "")
    return f"; write {plain} without {'underscores' if '_' in given else 'quotes'}"


def describe(annotation: Any) -> str:
    """What an annotation allows, in words: type, range, choices."""
    if isinstance(annotation, dict):  # the fields of a section
        return f"a mapping with the keys {', '.join(annotation)}"
    kind, bounds = _unwrap(annotation)
    members = _members(kind)
    if members:
        return " or ".join(dict.fromkeys(describe(m) for m in members)) + _range(bounds)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        words = f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    elif origin in (list, tuple):
        words = f"a list of {_plural(args[0])}" if args else "a list"
    elif origin is dict:
        words = f"a mapping of names to {_plural(args[1])}"
    elif isinstance(kind, type) and issubclass(kind, Section):
        words = describe(dict.fromkeys(kind.by_key()))
    else:
        words = _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
    return words + _range(bounds)


def _plural(annotation: Any) -> str:
    words = describe(annotation)
    return f"items that are each {words}" if words != "text" else "texts"


def _range(bounds: Mapping[str, Any]) -> str:
    return "".join(
        f", {_BOUNDS[k]} {v:g}" if isinstance(v, float) else f", {_BOUNDS[k]} {v}"
        for k, v in bounds.items()
    )


def _unwrap(annotation: Any) -> tuple[Any, dict[str, Any]]:
    """An annotation without Annotated or Field, and the bounds these carried."""
    bounds: dict[str, Any] = {}
    while True:
        metadata: tuple[Any, ...] = ()
        if isinstance(annotation, FieldInfo):
            metadata, annotation = tuple(annotation.metadata), annotation.annotation
        elif get_origin(annotation) is Annotated:
            metadata, annotation = annotation.__metadata__, annotation.__origin__
        else:
            return annotation, bounds
        flat = [m for item in metadata for m in (item, *getattr(item, "metadata", ()))]
        for name in _BOUNDS:
            for item in flat:
                value = getattr(item, name, None)
                if isinstance(value, int | float | str):
                    bounds.setdefault(name, value)


def _members(kind: Any) -> list[Any]:
    return list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else []


def choices(annotation: Any) -> list[str]:
    """The texts that a Literal allows, or those of an annotation's alternatives."""
    if annotation is None or isinstance(annotation, dict):
        return []
    kind, _ = _unwrap(annotation)
    if get_origin(kind) is Literal:
        return [str(a) for a in get_args(kind)]
    return [c for member in _members(kind) for c in choices(member)]


def _locate(loc: tuple[Any, ...], error: str, data: Any, root: type[Section]) -> tuple[Path, Any]:
    """The real path of a pydantic location, and the annotation (or fields) that rule there.

    Pydantic puts the tag of a union's member into the location; no such key exists in the data.
    """
    path: Path = ()
    allowed: Any = root
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        options = [_concrete(m, data) for m in alternatives(allowed)]
        inner = None
        for option in options:
            inner = inner if inner is not None else _child(option, part)
        if inner is None and last and error == "extra_forbidden":
            return (*path, part), _fields(options)
        if inner is None:
            tagged = [o for o in options if _tag(o, part)]
            allowed = tagged[0] if tagged else allowed
            continue
        path, allowed, data = (*path, part), inner, get(data, (part,))
    return path, allowed


def _fields(options: Iterable[Any]) -> dict[str, Any]:
    sections = [o for o in options if isinstance(o, type) and issubclass(o, Section)]
    return {name: field for s in sections for name, field in s.by_key().items()}


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, unions inside of it unfolded; of anything else, itself."""
    kind, _ = _unwrap(annotation)
    members = _members(kind)
    return [x for m in members for x in alternatives(m)] if members else [kind]


def _concrete(kind: Any, data: Any) -> Any:
    """A registry's base class as the class that ``data`` names."""
    if kind in REGISTERED and isinstance(data, dict):
        key, table, default = REGISTERED[kind]
        return table.get(str(data.get(key, default)), kind)
    return kind


def _child(kind: Any, part: Any) -> Any:
    """The annotation of ``part`` inside ``kind``, or None."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind.by_key().get(part) if isinstance(part, str) else None
    origin, args = get_origin(kind), get_args(kind)
    if origin is list and isinstance(part, int):
        return args[0]
    if origin is tuple and isinstance(part, int):
        return args[0] if len(args) == 2 and args[1] is ... else args[min(part, len(args) - 1)]
    if origin is dict and isinstance(part, str):
        return args[1]
    return None


def _tag(kind: Any, part: Any) -> bool:
    return part in tags(kind) or part == getattr(kind, "__name__", None)


def tags(kind: Any) -> list[str]:
    """What a union's discriminator may say for this member."""
    if isinstance(kind, type) and issubclass(kind, Section) and "kind" in kind.model_fields:
        return choices(kind.model_fields["kind"])
    return []
