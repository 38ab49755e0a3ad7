"""Edits of the package's source, applied to the process that runs: what a wrong line would do.

A planted bug is a few lines of a file as somebody might have written them. `applied` compiles the
edited file and gives every live function whose code changed the new code. Function objects stay
the same, so whoever imported one, wrapped it or holds it as a bound method runs the edit.
Assignments of modules and classes that changed are made again. On leaving, all is as before.

What cannot be put into a running process is refused: a decorator, a default of a parameter, a
base class, an import, a field of a dataclass, another set of closed-over names.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

PACKAGE = "shardwise"
_CACHED: Any = type(functools.lru_cache(len))
_Swap = tuple[CodeType, CodeType]  # old, new
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class EditError(Exception):
    """An edit that does not fit the source, or that this process cannot take over."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replace ``old``, which must stand once in ``file`` (below the package), by ``new``."""

    file: str
    old: str
    new: str
    package: str = PACKAGE

    @property
    def module(self) -> str:
        """The dotted name of the file's module."""
        return f"{self.package}.{self.file.removesuffix('.py').removesuffix('/__init__')}".replace(
            "/", "."
        )

    def of(self, source: str) -> str:
        """The edited source. Raises EditError if ``old`` does not stand there exactly once."""
        if (found := source.count(self.old)) != 1:
            raise EditError(f"{self.file}: the text to replace stands there {found} times")
        return source.replace(self.old, self.new)


@contextlib.contextmanager
def applied(edits: Sequence[Edit]) -> Iterator[list[str]]:
    """Run with the edits in place; yields the qualified names of what changed.

    Raises EditError for an edit that cannot be applied or changes nothing that lives here.
    """
    with contextlib.ExitStack() as undo:
        names: list[str] = []
        for path, values, swaps in _changes(edits):
            names += _set_values(values, undo) + _swap(swaps, path, undo)
        yield names


def fit(edits: Sequence[Edit]) -> None:
    """Raises EditError for an edit that cannot be applied or changes nothing; applies none.

    Whether what it changes lives in this process is not asked: that takes a walk over all objects.
    """
    for _ in _changes(edits):
        pass


def run_edited(edits: Sequence[Edit], fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``fn(*args, **kwargs)`` with the edits in place; for `RankPool.run`."""
    with applied(edits):
        return fn(*args, **kwargs)


def _changes(edits: Sequence[Edit]) -> Iterator[tuple[str, list[_Value], list[_Swap]]]:
    """Of each file its path, the values and the code that its edits change."""
    for name in dict.fromkeys(e.module for e in edits):
        module = importlib.import_module(name)
        path = module.__file__
        assert path is not None
        before = after = Path(path).read_text()
        for edit in (e for e in edits if e.module == name):
            after = edit.of(after)
        values = _changed_values(module, ast.parse(before), ast.parse(after))
        swaps = _changed_code(_compiled(before, path), _compiled(after, path))
        if not values and not swaps:
            raise EditError(f"{path}: the edit changes nothing")
        yield path, values, swaps


# --- functions ----------------------------------------------------------------------------------


def _compiled(source: str, path: str) -> CodeType:
    return compile(source, path, "exec", dont_inherit=True)


def _inner(code: CodeType) -> list[CodeType]:
    return [c for c in code.co_consts if isinstance(c, CodeType)]


def _bare(code: CodeType) -> CodeType:
    """The code without its place in the file."""
    consts = tuple(_bare(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(
        co_consts=consts, co_firstlineno=1, co_linetable=b"", co_filename="", co_exceptiontable=b""
    )


def _is_class_body(code: CodeType) -> bool:
    return "__qualname__" in code.co_names and not code.co_flags & 0x2  # CO_NEWLOCALS


def _changed_code(before: CodeType, after: CodeType) -> list[_Swap]:
    """(old, new) of every function whose code changed, those inside of others too."""
    old, new = _inner(before), _inner(after)
    if [c.co_qualname for c in old] != [c.co_qualname for c in new]:
        if before.co_name == "<module>" or _is_class_body(before):
            raise EditError(f"{before.co_qualname}: functions were added, dropped or renamed")
        return []  # of a function: its own new code makes them
    pairs: list[_Swap] = []
    for a, b in zip(old, new, strict=True):
        if not _is_class_body(a) and _bare(a) != _bare(b):
            pairs.append((a, b))
        pairs += _changed_code(a, b)
    return pairs


def _swap(pairs: Sequence[_Swap], path: str, undo: contextlib.ExitStack) -> list[str]:
    """Give live functions their new code; caches of their results are emptied, now and after."""
    live: dict[tuple[str, int], list[FunctionType]] = {}
    caches: dict[int, list[Any]] = {}
    gc.unfreeze()  # a rank froze what it shares with its server: such objects are not listed
    kinds = {FunctionType, _CACHED}  # of millions of objects: one pass that does little
    for thing in [t for t in gc.get_objects() if type(t) in kinds]:
        if type(thing) is _CACHED:
            caches.setdefault(id(thing.__wrapped__), []).append(thing)
        elif thing.__code__.co_filename == path:
            key = (thing.__code__.co_qualname, thing.__code__.co_firstlineno)
            live.setdefault(key, []).append(thing)
    names = []
    for old, new in pairs:
        # By place, not by code: pytest rewrites the assertions of a package with an entry point.
        found = live.get((old.co_qualname, old.co_firstlineno), [])
        if not found and "<locals>" not in old.co_qualname:
            raise EditError(f"{old.co_qualname}: no such function lives in this process")
        if found and old.co_freevars != new.co_freevars:
            raise EditError(f"{old.co_qualname}: other names are closed over than before")
        for function in found:
            for cache in caches.get(id(function), []):
                cache.cache_clear()
                undo.callback(cache.cache_clear)
            undo.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = new
        names.append(old.co_qualname)
    return names


# --- assignments --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Value:
    """A name of a module or class, and its new value."""

    owner: Any
    name: str
    value: Any


def _changed_values(module: ModuleType, before: ast.Module, after: ast.Module) -> list[_Value]:
    return list(_of_body(module, module, before.body, after.body, module.__name__))


def _of_body(
    module: ModuleType, owner: Any, old: list[ast.stmt], new: list[ast.stmt], where: str
) -> Iterator[_Value]:
    """Assignments of a module's or class's body that changed; EditError for anything else."""
    if len(old) != len(new):
        raise EditError(f"{where}: statements were added or dropped outside of functions")
    for a, b in zip(old, new, strict=True):
        if isinstance(a, _Definition) and isinstance(b, _Definition):
            if _heading(a) != _heading(b):
                raise EditError(f"{where}.{a.name}: a name, decorator, base or parameter changed")
            if isinstance(a, ast.ClassDef) and isinstance(b, ast.ClassDef):
                inner = getattr(owner, a.name)
                yield from _of_body(module, inner, a.body, b.body, f"{where}.{a.name}")
        elif ast.dump(a) != ast.dump(b):
            yield _evaluated(module, owner, b, where)


def _heading(definition: _Definition) -> str:
    """All of a definition but its body."""
    return ast.dump(type(definition)(**{**dict(ast.iter_fields(definition)), "body": []}))


def _evaluated(module: ModuleType, owner: Any, statement: ast.stmt, where: str) -> _Value:
    target: ast.expr | None = None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target = statement.target
    if not isinstance(target, ast.Name) or dataclasses.is_dataclass(owner):
        raise EditError(f"{where}: {ast.unparse(statement)!r} cannot be put into a running process")
    names = {**vars(module), **(vars(owner) if owner is not module else {})}
    code = compile(ast.Module([statement], []), str(module.__file__), "exec", dont_inherit=True)
    exec(code, names)  # noqa: S102 (a line of this repository's own tests)
    return _Value(owner, target.id, names[target.id])


def _set_values(values: Sequence[_Value], undo: contextlib.ExitStack) -> list[str]:
    """Also where another module imported a module's value under the same name."""
    for value in values:
        before = vars(value.owner)[value.name]
        owners = [value.owner]
        if isinstance(value.owner, ModuleType):
            owners += [m for m in _modules() if vars(m).get(value.name) is before]
        for owner in dict.fromkeys(owners):
            undo.callback(setattr, owner, value.name, before)
            setattr(owner, value.name, value.value)
    return [f"{value.owner.__name__}.{value.name}" for value in values]


def _modules() -> list[ModuleType]:
    return [m for n, m in sys.modules.items() if n.split(".")[0] == PACKAGE]
