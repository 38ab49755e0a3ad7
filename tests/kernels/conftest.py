"""A process in which Triton's interpreter runs the kernels, on CPU tensors."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


def interpret(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function of `shardwise_kernels.quantize`."""
    from shardwise_kernels import quantize

    assert quantize._INTERPRETED, "the kernels are not interpreted"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of infinities
        return getattr(quantize, name)(*args, **kwargs)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """``interpreted(name, *args, **kwargs)`` is `interpret` in that process.

    It is a fresh one because Triton decides when it is imported, which torch may do early.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(int).result(timeout=60)
    with pool:
        yield lambda *args, **kwargs: pool.submit(interpret, *args, **kwargs).result(timeout=120)
