"""Torch's archives: what they hold, by `program`, and their tensors, by their bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import mmap
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shardwise import safe_files
from shardwise.checkpoint.manifest import DamagedError
from shardwise.environment import clean_environment
from shardwise.errors import DataError, UserError

PROGRAM = Path(__file__).with_name("program.py")
DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
MAPPINGS = ("dict", "collections.OrderedDict", "collections.defaultdict")
INDEX = "torch.distributed.checkpoint.metadata.MetadataIndex"  # a key: a name and where in it
_LOCAL_HEADER = 30  # bytes of a zip entry before its name


class UnreadableError(UserError, DamagedError):
    """An archive that is damaged or of another format; the message begins with its path."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """What a call was to make, of a kind that is nothing here."""

    of: str
    args: tuple[Any, ...] = ()
    state: Any = None


class Pickle:
    """A pickle in a file. ``value``: what it stands for."""

    def __init__(self, path: Path, pickle: bytes) -> None:
        self.path, self.pickle = path, pickle
        self.value: Any = None


@dataclasses.dataclass(frozen=True)
class At:
    """An archive that is a part of a file: ``length`` bytes from ``offset``."""

    path: Path
    offset: int
    length: int


class Archive(Pickle):
    """A file or a part of one, mapped; tensors in its ``value`` are `Stored`."""

    def __init__(self, place: Path | At, maps: dict[Path, mmap.mmap]) -> None:
        path = place if isinstance(place, Path) else place.path
        try:
            if path not in maps:  # each map keeps its file open
                with safe_files.open_regular(path) as stream:
                    maps[path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            self.map = maps[path]
            at = place if isinstance(place, At) else At(path, 0, len(self.map))
            if at.offset + at.length > len(self.map):
                raise ValueError("it is shorter than is said")
            window = _Window(self.map, at.offset, at.length)
            records, pickle = _records(io.BufferedReader(window))
            self.records = {k: (at.offset + start, e) for k, (start, e) in records.items()}
            super().__init__(path, pickle)
        except (DataError, OSError) as error:
            raise UnreadableError(f"{path}: cannot be read: {error}") from None
        except (zipfile.BadZipFile, ValueError, EOFError, zlib.error, RuntimeError) as error:
            raise UnreadableError(
                f"{path}: no archive as torch.save writes it: damaged, truncated, or of a release "
                f"before torch 1.6 ({error})"
            ) from None
        self.check()

    def check(self) -> None:
        """Raises UnreadableError for a storage whose bytes do not have their checksum."""
        with memoryview(self.map) as whole:
            for key, (start, entry) in self.records.items():
                if zlib.crc32(whole[start : start + entry.file_size]) != entry.CRC:
                    raise UnreadableError(
                        f"{self.path}: damaged: the bytes of its storage {key!r} do not have the "
                        "checksum that the archive says"
                    )


class _Window(io.RawIOBase):
    """A stretch of a mapped file as a file."""

    def __init__(self, of: mmap.mmap, offset: int, length: int) -> None:
        self.map, self.offset, self.length, self.at = of, offset, length, 0

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """See `io.RawIOBase`. Raises ValueError for a place before the first byte."""
        self.at = (0, self.at, self.length)[whence] + offset
        if self.at < 0:
            raise ValueError("it begins before its first byte")
        return self.at

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        count = max(0, min(len(buffer), self.length - self.at))
        start = self.offset + self.at
        buffer[:count] = self.map[start : start + count]
        self.at += count
        return count


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in an archive: a view of one of its storages."""

    archive: Archive
    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def tensor(self) -> Tensor:
        """A view of the mapped file; it may be written to, and the file stays as it is."""
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.key not in self.archive.records:
            raise UnreadableError(f"{self.archive.path}: its storage {self.key!r} is missing")
        start, entry = self.archive.records[self.key]
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        if (last + 1) * self.dtype.itemsize > entry.file_size:
            raise UnreadableError(f"{self.archive.path}: a tensor ends behind its storage")
        count = last + 1 - self.offset
        first, size = start + self.offset * self.dtype.itemsize, self.dtype.itemsize
        if first % size:  # in a part of a file nothing need be aligned
            raw = torch.frombuffer(
                self.archive.map, dtype=torch.uint8, count=count * size, offset=first
            )
            flat = raw.clone().view(self.dtype)
        else:
            flat = torch.frombuffer(self.archive.map, dtype=self.dtype, count=count, offset=first)
        return flat.as_strided(self.shape, self.stride)


def _records(stream: BinaryIO) -> tuple[dict[str, tuple[int, zipfile.ZipInfo]], bytes]:
    """Where each storage lies, by its key, and the pickle."""
    with zipfile.ZipFile(stream) as file:
        entries = {entry.filename: entry for entry in file.infolist()}
        found = [name for name in entries if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("it has no single data.pkl")
        prefix = found[0].removesuffix("data.pkl")
        order = entries.get(f"{prefix}byteorder")
        if order is not None and file.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        records: dict[str, tuple[int, zipfile.ZipInfo]] = {}
        for name, entry in entries.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise ValueError(f"{name} is compressed or encrypted")
            if name.startswith(f"{prefix}data/"):
                records[name.removeprefix(f"{prefix}data/")] = (_start(stream, entry), entry)
        return records, file.read(found[0])


def _start(stream: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """The first byte of what an entry holds."""
    stream.seek(entry.header_offset)
    header = stream.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
        raise ValueError(f"{entry.filename} is not where its table says")
    sizes = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + _LOCAL_HEADER + sizes
    if start + entry.file_size > stream.seek(0, 2):
        raise ValueError(f"{entry.filename} ends behind the file")
    return start


def read(places: Iterable[Path | At]) -> list[Archive]:
    """Archives with what they hold, interpreted in one process that can do nothing else.

    Raises UnreadableError, which begins with the path, for what is damaged or of another format,
    UserError where this system cannot close the sandbox.
    """
    maps: dict[Path, mmap.mmap] = {}
    archives = [Archive(place, maps) for place in places]
    _interpret(archives)
    return archives


def read_plain(path: Path) -> Any:
    """What a file that is a pickle and nothing else stands for; raises as `read` does."""
    try:
        found = Pickle(path, safe_files.read_bytes(path))
    except (DataError, OSError) as error:
        raise UnreadableError(f"{path}: cannot be read: {error}") from None
    _interpret([found])
    return found.value


def _interpret(archives: Sequence[Pickle]) -> None:
    """Give each its value."""
    for archive, found in zip(archives, _interpreted(archives)):
        if "value" not in found:
            raise UnreadableError(f"{archive.path}: its pickle is no data: {found.get('error')}")
        try:
            archive.value = _decode(found["value"], archive)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UnreadableError(f"{archive.path}: its pickle is no data: {error!r}") from None


def _interpreted(archives: Sequence[Pickle]) -> Iterator[dict[str, Any]]:
    environment = clean_environment(LANG="C.UTF-8", PYTHONHASHSEED="0")
    parts = [len(a.pickle).to_bytes(8, "little") + a.pickle for a in archives]
    done = subprocess.run(
        [sys.executable, "-I", "-B", str(PROGRAM)],
        input=b"".join(parts),
        capture_output=True,
        env=environment,
        check=False,
    )
    answers = iter(_frames(done.stdout))
    lacking = next(answers, {}).get("lacking")
    if lacking is None or lacking.keys() & {"seccomp", "capabilities"}:
        said = "; ".join(f"{k}: {v}" for k, v in lacking.items()) if lacking else "it did not start"
        raise UserError(
            f"this system cannot close the sandbox in which pickles are read ({said}). It needs "
            "Linux on x86_64 or aarch64 with seccomp filters; convert there"
        )
    for archive in archives:
        found = next(answers, None)
        if found is None:
            raise UnreadableError(f"{archive.path}: its pickle ended the process that read it")
        yield found


def _frames(data: bytes) -> Iterator[dict[str, Any]]:
    while len(data) >= 8:
        size = int.from_bytes(data[:8], "little")
        with contextlib.suppress(ValueError):  # cut off: the process has died
            yield json.loads(data[8 : 8 + size])
        data = data[8 + size :]


def _decode(value: Any, archive: Pickle) -> Any:
    if not isinstance(value, dict):
        return value
    of = value["of"]
    args = _decode(value.get("args"), archive)
    items = [_decode(item, archive) for item in value.get("items", ())]
    if of in MAPPINGS:
        pairs = [[_decode(part, archive) for part in pair] for pair in value.get("pairs", ())]
        return {k if isinstance(k, Hashable) else repr(k): v for k, v in pairs}
    if of in ("list", "set", "frozenset"):
        return items
    if of == "tuple":
        return tuple(items)
    if of == "torch.Size":
        return tuple(args[0])
    if of == "name":
        return Thing(str(args))
    if of.startswith("torch._utils._rebuild_parameter"):
        return args[0]
    if of == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes of its own
        of, args = args[0].of, args[2]
    if of == "torch._utils._rebuild_tensor_v2":
        return _stored(args, archive)
    args = args if isinstance(args, tuple) else (args,)
    state = _decode(value.get("state"), archive)
    if of == INDEX:
        return state["fqn"], state.get("offset")  # bytes have none
    return Thing(of, args, state)


def _stored(args: tuple[Any, ...], archive: Pickle) -> Any:
    kept, offset, shape, stride = args[:4]
    what, storage, key, *_ = kept.args
    dtype = DTYPES.get(storage.of)
    if what != "storage" or dtype is None or not isinstance(archive, Archive):
        return Thing(f"a tensor of {storage.of}")
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor has no such shape")
    return Stored(archive, str(key), dtype, offset, tuple(shape), tuple(stride))
