"""Torch's archives, written: what `torch.load` reads, of plain data and tensors.

The few instructions are put down by hand, as nothing here can make a pickle of an object.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.checkpoint.pickles.archive import DTYPES
from shardwise.checkpoint.shards import bytes_of

STORAGES = {dtype: name for name, dtype in DTYPES.items()}
_PROTOCOL, _STOP, _CALL, _ELSEWHERE = b"\x80\x02", b".", b"R", b"Q"


def write(path: Path, value: Any) -> None:
    """An archive of nested dicts, lists and tuples of numbers, texts, None and tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(archived(value, path.stem))


def archived(value: Any, name: str) -> bytes:
    """The same as bytes; ``name``: of the folder in it."""
    stored: list[Tensor] = []
    program = _PROTOCOL + _encode(value, stored) + _STOP
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as file:
        file.writestr(f"{name}/data.pkl", program)
        file.writestr(f"{name}/byteorder", b"little")
        for key, tensor in enumerate(stored):
            file.writestr(f"{name}/data/{key}", bytes_of(tensor))
        file.writestr(f"{name}/version", b"3\n")
    return made.getvalue()


def _encode(value: Any, stored: list[Tensor]) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, torch.Size):
        return _name("torch.Size") + _tuple([tuple(value)], stored) + _CALL
    if isinstance(value, tuple):
        return _tuple(value, stored)
    if isinstance(value, list):
        return b"](" + b"".join(_encode(v, stored) for v in value) + b"e"
    if isinstance(value, dict):
        pairs = (_encode(k, stored) + _encode(v, stored) for k, v in value.items())
        return b"}(" + b"".join(pairs) + b"u"
    assert isinstance(value, Tensor), type(value)
    return _tensor(value, stored)


def _tuple(items: Any, stored: list[Tensor]) -> bytes:
    return b"(" + b"".join(_encode(v, stored) for v in items) + b"t"


def _name(dotted: str) -> bytes:
    module, _, name = dotted.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def _tensor(value: Tensor, stored: list[Tensor]) -> bytes:
    value = value.detach().cpu().contiguous()
    stored.append(value)
    kept = b"(" + _encode("storage", stored) + _name(STORAGES[value.dtype])
    kept += b"".join(_encode(v, stored) for v in (str(len(stored) - 1), "cpu", value.numel()))
    shape, stride = tuple(value.shape), _strides(value.shape)
    rest = b"".join(_encode(v, stored) for v in (0, shape, stride, False))
    hooks = _name("collections.OrderedDict") + b")" + _CALL
    call = _name("torch._utils._rebuild_tensor_v2")
    return call + b"(" + kept + b"t" + _ELSEWHERE + rest + hooks + b"t" + _CALL


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
