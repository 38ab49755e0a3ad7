"""Every call into deepspeed is one that its trusted releases accept; see tests/contracts."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from shardwise.engines.deepspeed import library
from tests.contracts.extract import CALLS
from tests.contracts.signatures import signature, versions
from tests.engines.deepspeed.test_engine import deepspeed
from tests.support.engines import train
from tests.support.pool import RankPool

pytest.importorskip("deepspeed")

Call = tuple[str, int, tuple[str, ...]]  # its name, positional arguments, keywords


def watched(call: str, real: Callable[..., Any], into: set[Call]) -> Callable[..., Any]:
    """``real``, each call of which is noted; of methods, without their object."""
    method = call.split(".")[-2][0].isupper() or call.endswith(".Init")

    @functools.wraps(real)
    def noting(*args: Any, **kwargs: Any) -> Any:
        into.add((call, len(args) - method, tuple(sorted(kwargs))))
        return real(*args, **kwargs)

    return noting


@contextlib.contextmanager
def watching(into: set[Call]) -> Iterator[None]:
    library.load("cpu")
    with contextlib.ExitStack() as stack:
        for call in CALLS["deepspeed"]:
            place, _, name = call.rpartition(".")
            owner: Any
            if place.rpartition(".")[2][0].isupper():  # a method
                place, _, kind = place.rpartition(".")
                owner = getattr(importlib.import_module(place), kind)
            else:
                owner = importlib.import_module(place)
            if name == "Init":
                owner, name = owner.Init, "__init__"
            stack.enter_context(
                mock.patch.object(owner, name, watched(call, getattr(owner, name), into))
            )
        yield


def on_rank(layout: str, precision: str) -> set[Call]:
    into: set[Call] = set()
    with watching(into):
        train(deepspeed(layout, precision=precision), None)
    return into


@pytest.fixture(scope="module")
def calls(ranks: RankPool) -> set[Call]:
    cases = (("dp2.zero0", "fp32"), ("dp2.zero1", "bf16"), ("dp2.zero2", "fp32"))
    cases += (("dp2.zero3", "fp32"),)
    return set().union(*(c for case in cases for c in ranks.run(on_rank, *case)))


def test_every_call_is_made(calls: set[Call]) -> None:
    assert {name for name, *_ in calls} == set(CALLS["deepspeed"])


@pytest.mark.parametrize("version", versions("deepspeed"))
def test_released_versions_accept_every_call(calls: set[Call], version: str) -> None:
    assert library.untrusted(version) is None
    for call, positional, keywords in sorted(calls):
        signature("deepspeed", call, version).bind(*[0] * positional, **dict.fromkeys(keywords, 0))
