"""Edits of a toy module's source: everything that lives runs them, and everything is put back."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.verify.edits import Edit, EditError, applied, run_edited

SOURCE = """
from __future__ import annotations

import contextlib
import dataclasses
import functools

RATE = 10
TABLE = {"a": 1}


def plain(x, scale=1):
    return x + 1


def traced(fn):
    @functools.wraps(fn)
    def run(*args):
        return fn(*args)
    return run


@traced
def wrapped(x):
    return x * 2


@functools.lru_cache
def cached(x):
    return x - 1


@contextlib.contextmanager
def around():
    yield "before"


def maker(step):
    def add(x):
        return x + step
    return add


def pair():
    return [(lambda: "left"), (lambda: "right")]


class Thing:
    size = 3

    def __init__(self):
        self.kept = "kept"

    def method(self):
        return self.size * 2

    @staticmethod
    def static(x):
        return x + 5

    @classmethod
    def made(cls):
        return cls.__name__ + "!"

    @property
    def width(self):
        return 7

    @functools.cached_property
    def depth(self):
        return 8


@dataclasses.dataclass(frozen=True)
class Row:
    number: int = 1

    def double(self):
        return self.number * 2
"""


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Any]:
    file = tmp_path / "toy_edited.py"
    file.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("shardwise.toy_edited", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def edit(old: str, new: str) -> Edit:
    return Edit("toy_edited.py", old, new)


# What is asked, before and after the edit.
CASES: list[tuple[str, str, Callable[[Any], Any], Any, Any]] = [
    ("return x + 1", "return x + 2", lambda toy: toy.plain(1), 2, 3),
    ("return x * 2", "return x * 3", lambda toy: toy.wrapped(2), 4, 6),
    ("return x - 1", "return x - 2", lambda toy: toy.cached(5), 4, 3),
    ('yield "before"', 'yield "after"', lambda toy: toy.around().__enter__(), "before", "after"),
    ("return x + step", "return x - step", lambda toy: toy.maker(1)(5), 6, 4),
    ("return self.size * 2", "return self.size * 4", lambda toy: toy.Thing().method(), 6, 12),
    ("return x + 5", "return x + 6", lambda toy: toy.Thing.static(1), 6, 7),
    ('cls.__name__ + "!"', 'cls.__name__ + "?"', lambda toy: toy.Thing.made(), "Thing!", "Thing?"),
    ("return 7", "return 70", lambda toy: toy.Thing().width, 7, 70),
    ("return 8", "return 80", lambda toy: toy.Thing().depth, 8, 80),
    ("return self.number * 2", "return self.number", lambda toy: toy.Row(4).double(), 8, 4),
    ("RATE = 10", "RATE = 2 * 6", lambda toy: toy.RATE, 10, 12),
    ('TABLE = {"a": 1}', 'TABLE = {"a": RATE}', lambda toy: toy.TABLE["a"], 1, 10),
    ("size = 3", "size = 4", lambda toy: toy.Thing().method(), 6, 8),
    ('lambda: "right"', 'lambda: "wrong"', lambda toy: toy.pair()[1](), "right", "wrong"),
]  # fmt: skip


@pytest.mark.parametrize("old,new,question,before,after", CASES)
def test_what_lives_runs_the_edit_and_is_put_back(
    old: str, new: str, question: Callable[[Any], Any], before: Any, after: Any, toy: ModuleType
) -> None:
    assert question(toy) == before
    with applied([edit(old, new)]) as names:
        assert len(names) >= 1
        assert question(toy) == after
    assert question(toy) == before


def test_functions_that_were_imported_bound_or_made_before_run_it(toy: Any) -> None:
    plain, method, add = toy.plain, toy.Thing().method, toy.maker(2)
    others = ModuleType("shardwise.toy_other")
    others.RATE = toy.RATE  # type: ignore[attr-defined]
    sys.modules[others.__name__] = others
    try:
        edits = [
            edit("return x + 1", "return x + 2"),
            edit("return self.size * 2", "return self.size"),
            edit("return x + step", "return x * step"),
            edit("RATE = 10", "RATE = 11"),
        ]
        with applied(edits) as names:
            assert {"plain", "Thing.method", "maker.<locals>.add"} < set(names)
            assert (plain(1), method(), add(5)) == (3, 3, 10)
            assert toy.RATE == others.RATE == 11  # type: ignore[attr-defined]
        assert (plain(1), method(), add(5), others.RATE) == (2, 6, 7, 10)  # type: ignore[attr-defined]
    finally:
        del sys.modules[others.__name__]


def test_an_edit_may_move_what_stands_below_it(toy: Any) -> None:
    before = toy.wrapped.__wrapped__.__code__
    with applied([edit("return x + 1", "y = x\n\n    return y + 2")]) as names:
        assert names == ["plain"] and toy.wrapped.__wrapped__.__code__ is before
        assert toy.plain(1) == 3


def test_an_error_inside_puts_all_back(toy: Any) -> None:
    with pytest.raises(ZeroDivisionError), applied([edit("return x + 1", "return x / 0")]):
        toy.plain(1)
    assert toy.plain(1) == 2
    with pytest.raises(EditError):  # the second cannot be applied
        run_edited([edit("RATE = 10", "RATE = 1"), edit("number: int = 1", "number: int = 2")], int)
    assert toy.RATE == 10


def test_run_edited_runs_a_function_inside(toy: Any) -> None:
    assert run_edited([edit("return x + 1", "return x + 9")], toy.plain, x=1) == 10


@pytest.mark.parametrize(
    "old,new,reason",
    [
        ("return x + 10", "return x", "0 times"),
        ("return x", "return y", "5 times"),
        ("return x + 1", "return (x + 1)", "changes nothing"),
        ("return x + 1", "return x + 1  # one", "changes nothing"),
        ("scale=1", "scale=2", "parameter changed"),
        ("@traced\n", "", "decorator"),
        ("import contextlib", "import abc", "cannot be put"),
        ("RATE = 10", "RATE = 10\nOTHER = 1", "added or dropped"),
        ("number: int = 1", "number: int = 2", "cannot be put"),
        ("def plain(", "def other(", "name"),
        ("return x + step", "return x", "closed over"),
    ],
)
def test_what_cannot_be_applied_is_refused(old: str, new: str, reason: str, toy: Any) -> None:
    alive = toy.maker(1)
    with pytest.raises(EditError, match=reason), applied([edit(old, new)]):
        pass
    assert alive(1) == 2


def test_a_function_that_is_gone_is_said(toy: Any) -> None:
    del toy.plain
    with (
        pytest.raises(EditError, match="plain: no such function"),
        applied([edit("return x + 1", "return x")]),
    ):
        pass


def test_functions_that_a_rank_froze_run_it_too(toy: Any) -> None:
    gc.freeze()
    try:
        with applied([edit("return x + 1", "return x + 2")]):
            assert toy.plain(1) == 3
    finally:
        gc.unfreeze()
