"""A recipe from YAML and overrides: strict, with the source of every value.

Nothing here reads an environment variable, and a value never changes its type on the way.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from shardwise import safe_files
from shardwise.config import overrides as override_room
from shardwise.config import registry, repeat, start, yaml12
from shardwise.config.explain import explain
from shardwise.config.run import RunConfig, inherit_engines
from shardwise.config.section import Section
from shardwise.config.source import Path as Keys
from shardwise.config.source import Problem, Source, Tree, dotted, places
from shardwise.errors import ConfigError, DataError

MAX_BYTES = 4_000_000
S = TypeVar("S", bound=Section)


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """A valid config and where each of its values (``stages.0.steps``) came from."""

    config: RunConfig
    provenance: dict[str, Source]


def load_config(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> LoadedConfig:
    """Read a recipe (a YAML file, or the same as a mapping) and apply ``section.key=value``.

    Raises ConfigError (exit code 2) that lists every problem: key, source, what was given, what
    is allowed, the nearest name.
    """
    registry.discover()
    if isinstance(recipe, Mapping):
        title, tree = "the given config", _from_mapping(recipe)
    else:
        title = str(recipe)
        tree = yaml12.parse(_read(Path(recipe)), title)
    override_room.apply(tree, overrides)
    if not isinstance(tree.data, dict):
        raise ConfigError(f"{title}: empty, or not a mapping; expected keys such as model, stages")
    start.fill(tree)
    repeat.expand(tree)
    config, problems = _validate(tree)
    if config is None:
        raise ConfigError(_message(title, problems))
    return LoadedConfig(config, _provenance(config, tree))


def load_section(path: str | Path, kind: type[S]) -> S:
    """Read a YAML file that is one section, as strictly as a recipe. Raises ConfigError."""
    title = str(path)
    tree = yaml12.parse(_read(Path(path)), title)
    if not isinstance(tree.data, dict):
        known = ", ".join(kind.by_key())
        raise ConfigError(f"{title}: empty, or not a mapping; known keys: {known}")
    problems, found = list(tree.problems), None
    try:
        found = kind.model_validate_json(json.dumps(tree.data), strict=True)
    except ValidationError as error:
        told = {p.path for p in problems}
        problems += [p for p in explain(error, tree, kind) if p.path not in told]
    if found is None or problems:
        raise ConfigError(_message(title, problems))
    return found


def _validate(tree: Tree) -> tuple[RunConfig | None, list[Problem]]:
    problems = list(tree.problems)
    config = None
    try:
        # As JSON, since only there pydantic's strict mode takes a text for a path.
        config = RunConfig.model_validate_json(json.dumps(tree.data), strict=True)
    except ValidationError as error:
        known = {p.path for p in problems}
        if ("init_from",) in known:  # what it would have said is not missing
            known |= {("model",), ("model", "family")}
        whole = dataclasses.replace(tree, data=inherit_engines(tree.data))
        for problem in explain(error, whole, RunConfig):
            path = _inherited(problem.path, tree)
            if path not in known:  # told already, or told where it was inherited from
                known.add(path)
                problems.append(Problem(path, tree.source(path), problem.text))
    return (None if problems else config), problems


def _inherited(path: Keys, tree: Tree) -> Keys:
    """Where a stage's ``engine`` value was really written: there, or in the top-level engine."""
    match path:
        case ("stages", int(), "engine", *rest) if path not in tree.sources:
            top: Keys = ("engine", *rest)
            return top if top in tree.sources else path
    return path


def _message(title: str, problems: Sequence[Problem]) -> str:
    if len(problems) == 1:
        return str(problems[0]) if problems[0].source.file else f"{title}: {problems[0]}"
    return "\n  ".join([f"{title}: {len(problems)} problems", *map(str, problems)])


def _provenance(config: RunConfig, tree: Tree) -> dict[str, Source]:
    """The source of each leaf: a scalar, or a list without mappings in it."""
    return {
        dotted(path): tree.sources.get(_inherited(path, tree), Source())
        for path, _ in leaves(config.model_dump(mode="json"))
    }


def leaves(data: Any, path: Keys = ()) -> list[tuple[Keys, Any]]:
    """Every (path, value) whose value is a scalar, a list without mappings, or empty."""
    if isinstance(data, dict) and data:
        return [leaf for key, value in data.items() for leaf in leaves(value, (*path, key))]
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        return [leaf for i, value in enumerate(data) for leaf in leaves(value, (*path, i))]
    return [(path, data)]


def _from_mapping(recipe: Mapping[str, Any]) -> Tree:
    try:
        data = json.loads(json.dumps(recipe, default=_jsonable))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the given config holds what is not plain data: {error}") from None
    source = Source("call")
    return Tree(data, places(data, (), source))


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r}; write text, numbers, booleans, lists or mappings")


def _read(path: Path) -> str:
    """The file's text; ConfigError that names the file and the mend when there is none."""
    try:
        with safe_files.open_regular(path) as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no such file{_near(path)}") from None
    except DataError as error:
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder{_recipes(path)}") from None
        raise ConfigError(str(error)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes is no recipe (limit {MAX_BYTES})")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise ConfigError(
            f"{path}:{line}:{column}: byte 0x{raw[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8 text"
        ) from None


def _near(path: Path) -> str:
    folder = path.parent
    try:
        names = sorted(p.name for p in folder.iterdir())
    except (OSError, ValueError):
        return f"; the folder {folder} is not there either"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    if close:
        return f"; did you mean {' or '.join(str(folder / name) for name in close)}?"
    return _recipes(folder)


def _recipes(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    return f"; {folder} holds {', '.join(names[:10]) or 'no .yaml file'}"
