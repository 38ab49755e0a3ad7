"""A GGUF file's header, walked before a library believes its counts, lengths and offsets.

The `gguf` package trusts them: an array of 2^60 bytes keeps it busy for ever, a nested one runs
into Python's recursion limit, and a length beyond the end of the file is cut short in silence.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path

from shardwise.errors import CheckpointError
from shardwise.safe_files import open_regular

MAX_ENTRIES = 1 << 20  # keys, and tensors; published models have hundreds
MAX_ELEMENTS = 1 << 25  # of all arrays together; a vocabulary and its merges are under 2^21
MAX_NAME = 1 << 16
MAX_DIMS = 4

_STRING, _ARRAY = 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_header(path: Path) -> None:
    """Raise CheckpointError, naming the byte, unless all of the header fits into the file.

    Raises OSError and DataError for what cannot be opened, or is no regular file.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 24:
            raise CheckpointError(
                f"{path} is not a readable GGUF file: byte {size}: truncated inside the header"
            )
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(path, data, size).all()


class _Walk:
    """A position in the file that never leaves it."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0
        self.elements = 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a readable GGUF file: byte {self.at}: {what}")

    def skip(self, num_bytes: int) -> int:
        """Go on; the position before."""
        start = self.at
        if num_bytes > self.size - start:
            raise self.fail(f"{num_bytes} bytes are said to follow, {self.size - start} do")
        self.at += num_bytes
        return start

    def number(self, width: int) -> int:
        return int.from_bytes(self.data[self.skip(width) : self.at], "little")

    def count(self, what: str, most: int) -> int:
        found = self.number(8)
        if found > most:
            raise self.fail(f"{found} {what}, and no model has more than {most}")
        return found

    def string(self, most: int | None = None) -> bytes:
        length = self.number(8)
        if most is not None and length > most:
            raise self.fail(f"a name of {length} bytes")
        start = self.skip(length)
        return self.data[start : self.at] if most is not None else b""

    def all(self) -> None:
        magic, version = struct.unpack("<4sI", self.data[self.skip(8) : self.at])
        if magic != b"GGUF" or version not in (2, 3):
            raise self.fail(f"not GGUF 2 or 3, little-endian (it says {magic!r}, {version})")
        tensors, keys = self.count("tensors", MAX_ENTRIES), self.count("keys", MAX_ENTRIES)
        for _ in range(keys):
            self.string(MAX_NAME)
            self.value(self.number(4))
        for _ in range(tensors):
            self.tensor()

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind in _WIDTHS:
            self.skip(_WIDTHS[kind])
        elif kind == _ARRAY:
            inner, length = self.number(4), self.number(8)
            self.elements += length
            if self.elements > MAX_ELEMENTS:
                raise self.fail(f"arrays of {self.elements} elements")
            if inner == _STRING:
                for _ in range(length):
                    self.string()
            elif inner in _WIDTHS:
                self.skip(length * _WIDTHS[inner])
            else:
                raise self.fail(f"an array of type {inner}")
        else:
            raise self.fail(f"a value of type {kind}")

    def tensor(self) -> None:
        name = self.string(MAX_NAME)
        dims = self.number(4)
        if dims > MAX_DIMS:
            raise self.fail(f"a tensor of {dims} dimensions")
        shape = [self.number(8) for _ in range(dims)]
        if math.prod(shape) > 64 * self.size or 0 in shape:  # no type takes less than a bit
            raise self.fail(f"tensor {name!r} of shape {shape}")
        self.skip(4)  # its type: the library knows them
        if (offset := self.number(8)) > self.size:
            raise self.fail(f"tensor {name!r} at byte {offset} of the data")
