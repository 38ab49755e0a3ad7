"""The safetensors format: eight bytes of header length, a JSON header, the raw values.

Written and read here and not by the safetensors package, because each byte is hashed on its way
from memory to the file, and because a read is bounded by the manifest before it is made. Files
are ordinary safetensors files; any reader opens them.
Format: https://github.com/huggingface/safetensors (README, section "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from shardwise.checkpoint.files import read_into
from shardwise.checkpoint.manifest import DamagedError

# safetensors' names of the dtypes, https://github.com/huggingface/safetensors (format section)
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 1 << 28


class Stored(NamedTuple):
    """Where a chunk lies in its file: the first byte and the number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def header(entries: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """The bytes in front of the values of ``entries`` (key, dtype, shape), stored in order."""
    table: dict[str, object] = {}
    position = 0
    for key, dtype, shape in entries:
        end = position + torch.Size(shape).numel() * dtype.itemsize
        table[key] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def read_header(file: int, name: str, *, complete: bool = True) -> dict[str, Stored]:
    """The table of an open safetensors file. Raises DamagedError unless it is exactly sound.

    ``complete=False`` reads the header of a truncated file too.
    """
    size = os.fstat(file).st_size
    try:
        prefix = bytearray(8)
        read_into(file, memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        text = bytearray(length)
        read_into(file, memoryview(text), 8)
        table = json.loads(text.decode("utf-8"))
        position = 0
        stored = {}
        for key, entry in table.items():
            if key == "__metadata__":
                continue
            shape = tuple(int(n) for n in entry["shape"])
            start, end = entry["data_offsets"]
            num_bytes = torch.Size(shape).numel() * DTYPES[entry["dtype"]].itemsize
            if start != position or end - start != num_bytes or min(shape, default=0) < 0:
                raise ValueError(f"{key!r} is misplaced")
            stored[key] = Stored(entry["dtype"], shape, 8 + length + start, num_bytes)
            position = end
        if complete and 8 + length + position != size:
            raise ValueError(f"{8 + length + position} bytes are described, {size} are there")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise DamagedError(f"{name}: damaged safetensors header ({error})") from None
    return stored


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; writable if the tensor is."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, nothing is allocated."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() == 1:  # float8 has no reductions of its own
        values = values.float()
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def first_nonfinite(name: str, values: Tensor) -> str:
    """Say where ``values`` are not finite."""
    bad = ~values.float().isfinite() if values.element_size() < 8 else ~values.isfinite()
    where = bad.nonzero()[0].tolist()
    found = float(values[tuple(where)].item())
    return f"tensor {name}: {found} at {where} ({int(bad.sum())} of {values.numel()} values)"


def block_hashes(data: memoryview, block_bytes: int) -> list[str]:
    """The xxh3-128 of each block of ``data``."""
    return [
        xxhash.xxh3_128_hexdigest(data[start : start + block_bytes])
        for start in range(0, len(data), block_bytes)
    ]
