"""A GGUF header's counts, lengths and types are believed only as far as the file goes."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from shardwise.errors import CheckpointError, DataError
from shardwise.models.gguf import from_gguf
from shardwise.models.gguf_header import check_header

pytest.importorskip("gguf")
HUGE = 1 << 60


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(tensors: int = 0, keys: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
TENSOR = text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
ARRAY = text(b"tokens") + struct.pack("<I", 9)


def test_a_sound_header_passes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = header(1, 2) + ARCHITECTURE + ARRAY + struct.pack("<IQ", 8, 1) + text(b"a") + TENSOR
    path.write_bytes(data + bytes(64))
    check_header(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GGUF", "truncated"),
        (b"GGML" + bytes(40), "not GGUF"),
        (header(keys=HUGE), "keys"),
        (header(tensors=HUGE), "tensors"),
        (header() + struct.pack("<Q", HUGE), "a name of"),
        (header() + text(b"k") + struct.pack("<IQ", 8, HUGE), "bytes are said to follow"),
        (header() + text(b"k") + struct.pack("<I", 99), "type 99"),
        (header() + ARRAY + struct.pack("<IQ", 0, HUGE), "elements"),
        (header() + ARRAY + struct.pack("<IQ", 0, 1 << 20), "bytes are said to follow"),
        (header() + ARRAY + struct.pack("<IQ", 8, 1 << 20), "bytes are said to follow"),
        (header() + ARRAY + struct.pack("<IQ", 9, 1) * 1000, "array of type 9"),
        (header(1, 0) + text(b"t") + struct.pack("<I", 1 << 31), "dimensions"),
        (header(1, 0) + text(b"t") + struct.pack("<IQQ", 2, HUGE, HUGE), "of shape"),
        (header(1, 0) + text(b"t") + struct.pack("<IQIQ", 1, 1, 0, HUGE), "at byte"),
    ],
)
def test_a_hostile_header_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data + (bytes(24) if len(data) > 4 else b""))
    with pytest.raises(CheckpointError, match=rf"m\.gguf .*{said}"):
        from_gguf(path)


def test_mutations_end_in_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    good = header(1, 2) + ARCHITECTURE + ARRAY + struct.pack("<IQ", 8, 2) + text(b"a") * 2 + TENSOR
    dice = random.Random(0)
    for _ in range(300):
        data = bytearray(good + bytes(64))
        for _ in range(dice.choice([1, 1, 2, 8])):
            data[dice.randrange(len(data))] = dice.choice([0, 1, 9, 127, 128, 255])
        path.write_bytes(data[: dice.choice([len(data), dice.randrange(len(data))])])
        with pytest.raises((CheckpointError, DataError)):  # no model: too little metadata
            from_gguf(path)
