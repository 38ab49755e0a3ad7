"""What every key of a recipe means: the schema, for people.

The pages of the reference and ``shardwise config explain`` are made of it, so neither can say
anything else than what the loader checks.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from shardwise.config import registry, yaml12
from shardwise.config.explain import REGISTERED, alternatives, choices, describe, nearest, tags
from shardwise.config.run import RunConfig
from shardwise.config.section import Section
from shardwise.errors import UserError

# Bounds that no recipe comes near, which guard the arithmetic alone.
_FAR = re.compile(r", (?:at most|below) (?:\d{7,}|[\d.]+e\+\d+)")


@dataclasses.dataclass(frozen=True)
class Key:
    """One key. ``default`` and ``example`` are YAML; a default of None: the key is required.

    ``section``: the path of the `Block` that it holds; empty for a plain value.
    """

    path: str
    type: str
    default: str | None
    meaning: str
    example: str
    section: str = ""

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Block:
    """A section with its keys; of one with several kinds what all have, or what a kind has besides.

    ``kinds``: names of the blocks below this one. ``example``: a whole section, as YAML, or none.
    """

    path: str
    meaning: str
    keys: tuple[Key, ...]
    kinds: tuple[str, ...] = ()
    example: str = ""


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A section by one of its names: ``key`` says which of ``table`` it is, else ``default``."""

    key: str
    table: Mapping[str, type[Section]]
    default: str | None
    base: type[Section]

    @property
    def identity(self) -> Any:
        """What it is known by: a registry's base class, or the members of a union."""
        return self.base if self.base in REGISTERED else tuple(self.table)


_Place = type[Section] | _Choice
_Home = Mapping[Any, str]  # by class, or a choice's identity


def blocks() -> list[Block]:
    """Every section of a recipe, each once, at the first place where it may stand."""
    registry.discover()
    return list(_walk(RunConfig, "", _homes()))


def find(dotted: str) -> tuple[Key | None, Block | None]:
    """The key at a path like ``stages.sft.batch``, and the section that it holds, if it does.

    A list is entered by a number or a kind, a section of several kinds by one of them. Raises
    UserError for a path that leads nowhere.
    """
    registry.discover()
    homes = _homes()
    place: _Place | None = RunConfig
    key: Key | None = None
    at = ""
    for part in filter(None, dotted.split(".")):
        fields = _fields(place)
        choice = place if isinstance(place, _Choice) else None
        if choice and part in choice.table:
            place, key = choice.table[part], None
        elif part in fields:
            owner, field = fields[part]
            key, place = _key(owner, field, _join(at, part), homes), _inside(field)
        elif not (choice and part.isdigit()):
            raise UserError(
                f"{dotted}: {_lost(part, at, [*(choice.table if choice else ()), *fields])}"
            )
        at = _join(at, part)
    return key, None if place is None else next(_walk(place, at, homes))


def _lost(part: str, at: str, known: list[str]) -> str:
    where = at or "a recipe"
    if not known:
        return f"{where} is a value; it holds no keys"
    return f"{where} has no {part!r}{nearest(part, known) or ';'} known: {', '.join(known)}"


def _homes() -> _Home:
    """Where each section is described: the first place where it may stand."""
    found: dict[Any, str] = {}

    def visit(place: _Place, path: str) -> None:
        for part, at, kind in _parts(place, path):
            if _identity(part) in found:
                continue
            found[_identity(part)] = at
            for name, (_, field) in _held(place, kind).items():
                if (inner := _inside(field)) is not None:
                    visit(inner, _join(at, name))

    visit(RunConfig, "")
    return found


def _walk(place: _Place, path: str, homes: _Home) -> Iterator[Block]:
    """The blocks at ``place`` and below, but for those whose home is elsewhere."""
    for part, at, kind in _parts(place, path):
        held = _held(place, kind)
        keys = [_key(owner, f, _join(at, name), homes) for name, (owner, f) in held.items()]
        cls, names = (part.base, tuple(part.table)) if isinstance(part, _Choice) else (part, ())
        yield Block(at, _doc(cls), tuple(keys), names, _whole(cls))
        for name, (_, field) in held.items():
            inner = _inside(field)
            if inner is not None and homes[_identity(inner)] == _join(at, name):
                yield from _walk(inner, _join(at, name), homes)


def _identity(place: _Place) -> Any:
    return place.identity if isinstance(place, _Choice) else place


_Held = dict[str, tuple[_Place, FieldInfo]]


def _held(place: _Place, kind: str) -> _Held:
    """The keys of a section; of a choice those that are the same in all kinds, or the others."""
    if not isinstance(place, _Choice):
        return {name: (place, field) for name, field in place.by_key().items()}
    same = _same(tuple(place.table.values()), place.key)
    if not kind:
        base = place.base.by_key()
        return {name: (place, base.get(name, field)) for name, field in same.items()}
    cls = place.table[kind]
    return {name: (cls, f) for name, f in cls.by_key().items() if name not in same}


@functools.cache
def _same(kinds: tuple[type[Section], ...], key: str) -> dict[str, FieldInfo]:
    """``key``, and what else is the same in all of them."""
    [first, *others] = [cls.by_key() for cls in kinds]
    return {
        name: field
        for name, field in first.items()
        if name == key or all(repr(other.get(name)) == repr(field) for other in others)
    }


def _parts(place: _Place, path: str) -> list[tuple[_Place, str, str]]:
    """A section; or a choice, and then each of its kinds. With their paths, and kinds' names."""
    if not isinstance(place, _Choice):
        return [(place, path, "")]
    kinds = [(cls, _join(path, name), name) for name, cls in place.table.items()]
    return [(place, path, ""), *kinds]


def _fields(place: _Place | None) -> _Held:
    """By name, what may stand in a section; where no kind is named, in one of any kind."""
    if not isinstance(place, _Choice):
        return {} if place is None else _held(place, "")
    kinds = sorted(place.table, key=lambda kind: kind == place.default)  # the default's word counts
    found = {name: held for kind in kinds for name, held in _held(place, kind).items()}
    return found | _held(place, "")


def _inside(annotation: Any) -> _Place | None:
    """The section, or the choice of sections, that an annotation has room for."""
    found = _sections(annotation)
    if not found:
        return None
    [first, *others] = found
    if not others:
        if first not in REGISTERED:
            return first
        key, table, default = REGISTERED[first]
        return _Choice(key, table, default, first)
    table = {name: cls for cls in found for name in tags(cls)}
    base = next(c for c in first.__mro__ if all(issubclass(cls, c) for cls in others))
    default = first.by_key()["kind"].default
    return _Choice("kind", table, None if default is PydanticUndefined else default, base)


def _sections(annotation: Any) -> list[type[Section]]:
    found: list[type[Section]] = []
    for kind in alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            found.append(kind)
        elif get_origin(kind) in (list, tuple, dict):
            found += [cls for inner in get_args(kind) for cls in _sections(inner)]
    return found


def _key(owner: _Place, field: FieldInfo, path: str, homes: _Home) -> Key:
    name, inner = path.rpartition(".")[2], _inside(field)
    if inner is not None:
        words = "a list of sections" if _is_list(field) else "a section"
        words += " or null" if field.default is None else ""
    elif _names_kind(owner, name):
        words = f"one of {', '.join(owner.table)}"  # type: ignore[union-attr]
    else:
        words = _FAR.sub("", describe(field))
    return Key(
        path,
        words,
        _default(owner, name, field),
        _meaning(owner, name, field),
        "\n".join(f"{k}: {yaml12.inline(v)}" for k, v in shown(owner, name, field).items()),
        homes[_identity(inner)] if inner is not None else "",
    )


def _names_kind(owner: _Place, name: str) -> bool:
    return isinstance(owner, _Choice) and name == owner.key


def _meaning(owner: _Place, name: str, field: FieldInfo) -> str:
    """What a key says, or what the class says from which a kind has it, or its section."""
    cls = owner.base if isinstance(owner, _Choice) else owner
    sections = [c for c in cls.__mro__ if issubclass(c, Section)]
    above = [c.by_key()[name] for c in sections if name in c.by_key()]
    said = next((f.description for f in (field, *above) if f.description), "")
    inner = _inside(field)
    if not said and inner is not None:
        return _doc(inner.base if isinstance(inner, _Choice) else inner)
    return said or ("which of them" if _names_kind(owner, name) else "")


def _default(owner: _Place, name: str, field: FieldInfo) -> str | None:
    if _names_kind(owner, name):
        return owner.default  # type: ignore[union-attr]
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if isinstance(value, Section) or value == "" else yaml12.inline(_plain(value))


def shown(owner: _Place, name: str, field: FieldInfo) -> dict[str, Any]:
    """An example of a key, with the keys that it needs beside it."""
    extra = field.json_schema_extra
    needed: Any = extra.get("beside", {}) if isinstance(extra, dict) else {}
    return {name: example(owner, name, field), **needed}


def example(owner: _Place, name: str, field: FieldInfo) -> Any:
    """A value of a key that is worth showing: given, else another one than the default."""
    given = None if isinstance(owner, _Choice) else _given(owner)
    if given is not None and name in given:
        return given[name]
    if field.examples:
        return field.examples[0]
    if isinstance(owner, _Choice) and name == owner.key:
        return next((kind for kind in owner.table if kind != owner.default), owner.default)
    if (inner := _inside(field)) is not None:
        return [minimal(inner)] if _is_list(field) else minimal(inner)
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, bool):
        return not default
    named = [choice for choice in choices(field) if choice != default]
    return named[0] if named else _plain(default)


def minimal(place: _Place) -> dict[str, Any]:
    """A small section that loads: what is required, and one key more if nothing is."""
    named: dict[str, Any] = {}
    if isinstance(place, _Choice):
        kind = place.default or next(iter(place.table))
        named, place = {place.key: kind}, place.table[kind]
    if (given := _given(place)) is not None:
        return named | given
    fields = {n: f for n, f in place.by_key().items() if n not in named}
    needed = [n for n, f in fields.items() if f.is_required()] or [next(iter(fields))]
    return named | {n: example(place, n, fields[n]) for n in needed}


def _given(cls: type[Section]) -> dict[str, Any] | None:
    """An example of a whole section, where its class has one as pydantic takes it."""
    extra: Any = cls.model_config.get("json_schema_extra") or {}
    return dict(extra["examples"][0]) if "examples" in extra else None


def _whole(cls: type[Section]) -> str:
    given = _given(cls)
    return "" if given is None else yaml12.dump(given)


def _doc(cls: type[Section]) -> str:
    """The first paragraph of its docstring."""
    if cls is Section:  # what kinds of a union share
        return "One of several kinds."
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def _is_list(field: FieldInfo) -> bool:
    return any(get_origin(kind) is list for kind in alternatives(field))


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return to_jsonable_python(value, serialize_unknown=True)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
