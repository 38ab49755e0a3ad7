"""The one call that we make of bitsandbytes, as its releases declare it, and machines without."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shardwise.ops import bitsandbytes

CPU = torch.device("cpu")
SCHEMA = (
    "bitsandbytes::dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, "
    "int[] shape, ScalarType dtype) -> Tensor"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    bitsandbytes._library.cache_clear()
    yield
    bitsandbytes._library.cache_clear()


def test_the_call_is_what_the_library_declares() -> None:
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    assert bitsandbytes.unusable(CPU) is None
    assert str(torch.ops.bitsandbytes.dequantize_4bit.default._schema) == SCHEMA


def test_without_it_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not on meta" in str(bitsandbytes.unusable(torch.device("meta")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'shardwise[qlora]'" in str(bitsandbytes.unusable(CPU))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_broken_one_is_left_alone(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class ErrorHandlerMockBNBNativeLibrary:  # what stands there when the compiled part fails
        pass

    class Library:
        __version__ = "0.50.2"
        lib = ErrorHandlerMockBNBNativeLibrary()

    def load(name: str) -> Any:
        if not compiled:
            raise OSError("libcudart.so.13")
        return Library

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", load)
    reason = str(bitsandbytes.unusable(CPU))
    assert ("no compiled part" if compiled else "libcudart") in reason
