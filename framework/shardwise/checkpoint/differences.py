"""`diff`: in what two checkpoints differ, tensor by tensor, whatever layouts wrote them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.checkpoint import manifest, steps
from shardwise.checkpoint.loading import Reader


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """Values that are not bitwise equal.

    ``max_rel`` is ``max_abs`` over the largest magnitude among the values that differ. A NaN
    against anything else makes both NaN; an infinity makes ``max_abs`` infinite and ``max_rel``
    NaN.
    """

    name: str
    num_different: int
    num_elements: int
    max_abs: float
    max_rel: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """What `diff` found. Everything is empty for equal checkpoints."""

    only_a: list[str]
    only_b: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: dict[str, tuple[str, str]]
    values: list[TensorDifference]
    meta: dict[str, tuple[Any, Any]]  # by dotted key; None where a key is missing
    files: list[str]  # small files that differ or are missing on one side

    @property
    def equal(self) -> bool:
        """Whether tensors, meta and small files are the same."""
        return not any(dataclasses.astuple(self))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "equal": self.equal}


def diff(a: Path | str, b: Path | str, *, verify: bool = True) -> Difference:
    """Compare two checkpoints; one pair of tensors is in memory at a time."""
    path_a, path_b = steps.resolve(a), steps.resolve(b)
    book_a, book_b = manifest.read(path_a), manifest.read(path_b)
    both = [name for name in book_a.tensors if name in book_b.tensors]
    pairs = {name: (book_a.tensors[name], book_b.tensors[name]) for name in both}
    values = []
    with Reader(path_a, book_a, verify) as in_a, Reader(path_b, book_b, verify) as in_b:
        for name, (x, y) in pairs.items():
            if x.shape == y.shape and (
                found := _compare(name, in_a.full_tensor(name), in_b.full_tensor(name))
            ):
                values.append(found)
    small_a, small_b = (
        {n: f.xxh3_128 for n, f in book.files.items() if n not in book.shard_names}
        for book in (book_a, book_b)
    )
    return Difference(
        only_a=[name for name in book_a.tensors if name not in book_b.tensors],
        only_b=[name for name in book_b.tensors if name not in book_a.tensors],
        shapes={n: (x.shape, y.shape) for n, (x, y) in pairs.items() if x.shape != y.shape},
        dtypes={n: (x.dtype, y.dtype) for n, (x, y) in pairs.items() if x.dtype != y.dtype},
        values=values,
        meta=dict(_meta_differences(book_a.meta, book_b.meta, "")),
        files=sorted(dict(small_a.items() ^ small_b.items())),
    )


def _compare(name: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    if a.dtype == b.dtype and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    ):
        return None
    x, y = a.to(torch.float64), b.to(torch.float64)
    different = (x != y) & ~(x.isnan() & y.isnan())
    num_different = int(different.sum())
    if not num_different:  # other NaN payloads, signed zeros, or equal values of another dtype
        return None if a.dtype != b.dtype else TensorDifference(name, 0, a.numel(), 0.0, 0.0)
    max_abs = float((x - y)[different].abs().max())
    largest = float(torch.maximum(x.abs(), y.abs())[different].max())
    return TensorDifference(name, num_different, a.numel(), max_abs, max_abs / largest)


def _meta_differences(a: Any, b: Any, where: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from _meta_differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    elif a != b or type(a) is not type(b):
        yield where, (a, b)
