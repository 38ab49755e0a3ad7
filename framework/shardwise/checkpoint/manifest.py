"""The manifest: what a checkpoint holds, and the hash of every byte of it. Strictly parsed.

JSON documents of a checkpoint are *sealed*: they start with the xxh3-128 of all bytes that follow
the hash, so that any damage to them is noticed without a second file. They stay plain JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from shardwise.checkpoint.files import read_small
from shardwise.errors import CheckpointError
from shardwise.ops.regions import Region, tiling_problem

NAME = "manifest.json"
FORMAT = 1
MAX_BYTES = 2 << 30
MAX_DIMS = 32
# Blocks of a chunk are hashed one by one, so that a rank that needs some rows reads only theirs.
BLOCK_BYTES = 16 << 20

# Bytes of a value by safetensors' name of its dtype. No torch here: to look is to look fast.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}

_SEAL = b'{"xxh3_128": "'
_SEALED_BODY = len(_SEAL) + 32
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_HASH = re.compile(r"[0-9a-f]{32}")


class DamagedError(CheckpointError):
    """The files of a checkpoint are not what was written; an older checkpoint may be used."""


class NonFiniteError(DamagedError):
    """A tensor holds NaN or an infinity; it was not saved, or an older checkpoint may be used."""


class PeerLostError(CheckpointError):
    """A rank that took part is gone; nothing can be agreed upon any more."""


class MismatchError(CheckpointError):
    """The checkpoint is sound, but its tensors are not the ones asked for."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A region of a tensor, stored under ``key`` in a safetensors file; one hash a block."""

    region: Region
    file: str
    key: str
    hashes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor of global ``shape``; ``dtype`` under its safetensors name."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return self.num_elements * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and xxh3-128 of the whole content."""

    size: int
    xxh3_128: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that is known of a checkpoint but its tensors' values."""

    step: int
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]
    meta: dict[str, Any]
    versions: dict[str, str]
    previous: str  # digest of the manifest that was the latest when this one was written
    block_bytes: int
    digest: str = ""  # of the manifest itself; set by `read`

    @property
    def shard_names(self) -> set[str]:
        """The files that hold tensors; the others are small files, stored as given."""
        return {chunk.file for entry in self.tensors.values() for chunk in entry.chunks}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, the inverse of `parse`."""
        return {
            "format": FORMAT,
            "step": self.step,
            "previous": self.previous,
            "versions": self.versions,
            "block_bytes": self.block_bytes,
            "meta": self.meta,
            "files": {name: dataclasses.asdict(entry) for name, entry in self.files.items()},
            "tensors": {
                name: {
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "chunks": [chunk_to_json(chunk) for chunk in entry.chunks],
                }
                for name, entry in self.tensors.items()
            },
        }


def chunk_to_json(chunk: Chunk) -> dict[str, Any]:
    """Plain JSON of one chunk."""
    return {
        "offset": list(chunk.region.offset),
        "shape": list(chunk.region.shape),
        "file": chunk.file,
        "key": chunk.key,
        "xxh3_128": list(chunk.hashes),
    }


def seal(document: Mapping[str, Any]) -> bytes:
    """JSON bytes of ``document`` with the hash of everything after the hash in front."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    body = b'", ' + text.encode("utf-8")[1:] + b"\n"
    return _SEAL + xxhash.xxh3_128_hexdigest(body).encode() + body


def unseal(data: bytes, source: Path) -> dict[str, Any]:
    """The document of sealed bytes. Raises DamagedError naming ``source``."""
    found = data[len(_SEAL) : _SEALED_BODY]
    expected = xxhash.xxh3_128_hexdigest(memoryview(data)[_SEALED_BODY:])
    if not data.startswith(_SEAL) or found != expected.encode():
        raise DamagedError(f"{source}: the content does not match its own hash; it is damaged")
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{source}: not a JSON document ({error})") from None
    if not isinstance(document, dict):
        raise DamagedError(f"{source}: not a JSON object")
    document.pop("xxh3_128")
    return document


def is_hash(text: str) -> bool:
    """Whether it is an xxh3-128 in hexadecimal."""
    return bool(_HASH.fullmatch(text))


def digest_of(sealed: bytes) -> str:
    """The hash that sealed bytes carry; it stands for the whole document."""
    return sealed[len(_SEAL) : _SEALED_BODY].decode()


def read(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory. Raises DamagedError naming file and entry."""
    path = directory / NAME
    try:
        data = read_small(directory, NAME, MAX_BYTES)
    except FileNotFoundError:
        raise DamagedError(
            f"{path}: missing; {directory} is not a complete shardwise checkpoint"
        ) from None
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error})") from None
    document = unseal(data, path)
    return dataclasses.replace(parse(document, path), digest=digest_of(data))


def check_file_name(name: str) -> str:
    """``name`` if it can only mean a file inside of the checkpoint. Raises CheckpointError."""
    if not isinstance(name, str) or len(name) > 512 or not _FILE_NAME.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is not a file name that a checkpoint may hold: letters, digits and ._- in "
            "parts that do not start with a dot, joined by /"
        )
    return name


def parse(document: Mapping[str, Any], source: Path) -> Manifest:
    """Check every field of a manifest. Raises DamagedError naming ``source`` and the entry."""
    where = "format"
    try:
        _require(document["format"] == FORMAT, f"format {document['format']!r}, not {FORMAT}")
        where = "files"
        files = {}
        for name, entry in _table(document["files"]):
            where = f"file {name!r}"
            files[check_file_name(name)] = FileEntry(_count(entry["size"]), _hash(entry))
        block_bytes = _count(document["block_bytes"])
        _require(block_bytes > 0 and block_bytes % 16 == 0, "block_bytes is no multiple of 16")
        tensors = {}
        taken: set[tuple[str, str]] = set()
        for name, entry in _table(document["tensors"]):
            where = f"tensor {name!r}"
            tensors[name] = _tensor(entry, files, taken, block_bytes)
        where = "meta, versions, previous or step"
        return Manifest(
            step=_count(document["step"]),
            tensors=tensors,
            files=files,
            meta=dict(_table(document["meta"])),
            versions={str(k): str(v) for k, v in _table(document["versions"])},
            previous=str(document["previous"]),
            block_bytes=block_bytes,
        )
    except CheckpointError as error:
        raise DamagedError(f"{source}: {where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(
            f"{source}: {where}: {type(error).__name__}: {error}; not a manifest of this version"
        ) from None


def _tensor(
    entry: Mapping[str, Any],
    files: Mapping[str, FileEntry],
    taken: set[tuple[str, str]],
    block_bytes: int,
) -> TensorEntry:
    dtype, shape = entry["dtype"], _counts(entry["shape"])
    _require(dtype in ITEM_BYTES, f"dtype {dtype!r} is unknown; known: {', '.join(ITEM_BYTES)}")
    _require(len(shape) <= MAX_DIMS, f"{len(shape)} dimensions")
    chunks = []
    for item in entry["chunks"]:
        region = Region(_counts(item["offset"]), _counts(item["shape"]))
        file, key = item["file"], item["key"]
        _require(
            len(region.offset) == len(region.shape) == len(shape), "a chunk of other dimensions"
        )
        _require(file in files, f"a chunk lies in {file!r}, which is not among the files")
        _require(isinstance(key, str), "a key that is not a string")
        _require((file, key) not in taken, f"{key!r} of {file} is used twice")
        taken.add((file, key))
        num_bytes = region.volume * ITEM_BYTES[dtype]
        _require(num_bytes <= files[file].size, f"a chunk larger than its file {file}")
        hashes = tuple(_hash({"xxh3_128": h}) for h in item["xxh3_128"])
        _require(len(hashes) == -(-num_bytes // block_bytes), "hashes of other blocks")
        chunks.append(Chunk(region, file, key, hashes))
    if problem := tiling_problem(shape, [c.region for c in chunks]):
        raise CheckpointError(problem)
    return TensorEntry(dtype, shape, tuple(chunks))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckpointError(otherwise)


def _table(value: Any) -> Any:
    _require(isinstance(value, dict), "not an object")
    return value.items()


def _count(value: Any) -> int:
    _require(type(value) is int and 0 <= value < 1 << 62, f"{value!r} is not a count")
    return int(value)


def _counts(value: Any) -> tuple[int, ...]:
    _require(isinstance(value, list), f"{value!r} is not a list of counts")
    return tuple(_count(v) for v in value)


def _hash(entry: Mapping[str, Any]) -> str:
    text = entry["xxh3_128"]
    _require(isinstance(text, str) and bool(_HASH.fullmatch(text)), f"{text!r} is not an xxh3-128")
    return str(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
