"""Content against the hash that was written with it: token stores, tokenizers, model folders.

A file is read whole once a machine. What it hashed to is remembered in the user's cache under its
path, device, inode, size, mtime and ctime; the last cannot be set back, so a file that was changed
and given its old mtime is read again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from shardwise import safe_files
from shardwise.errors import DataError

SUMS_FILE = "hashes.json"  # of a folder that we wrote: name -> size and hash
NO_VERIFY = "SHARDWISE_NO_VERIFY"  # the environment reaches every rank

_BLOCK = 1 << 20  # stays in the cache
_SETTLED_NS = 2_000_000_000  # younger files may change again within the clock's grain
_HASH = re.compile(r"[0-9a-f]{32}")


def entry(data: bytes) -> dict[str, Any]:
    """Size and xxh3-128, as a manifest holds them for a file of this content."""
    return {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with the hash of all its other keys under ``digest``."""
    return {**document, "digest": _digest(document)}


def is_sealed(document: Mapping[str, Any]) -> bool:
    """Whether ``document`` still is what `sealed` returned."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return bool(document.get("digest") == _digest(rest))


def _digest(document: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())


def is_entry(value: Any) -> bool:
    """Whether ``value`` has the form of an `entry`."""
    return (
        isinstance(value, dict)
        and type(value.get("size")) is int
        and isinstance(value.get("xxh3_128"), str)
        and _HASH.fullmatch(value["xxh3_128"]) is not None
    )


def check(stream: BinaryIO, path: Path, wanted: Mapping[str, Any], mend: str) -> None:
    """Raise DataError unless the open file at ``path`` has the content of the entry ``wanted``.

    Nothing is read under ``--no-verify``.
    """
    if os.environ.get(NO_VERIFY):
        return
    size = os.fstat(stream.fileno()).st_size
    if size != wanted["size"]:
        found = f"{size} bytes, not the {wanted['size']} that were written"
    elif content_hash(stream, path, wanted["xxh3_128"]) == wanted["xxh3_128"]:
        return
    else:
        found = "its content is not what was written (xxh3-128 differs)"
    raise DataError(f"{path}: {found}; {mend}")


def content_hash(stream: BinaryIO, path: Path, expected: str | None = None) -> str:
    """xxh3-128 of an open file, from memory if it has been read since it last changed.

    A remembered hash other than ``expected`` is not believed: the file is read.
    """
    handle = stream.fileno()
    before = _identity(handle, path)
    known = _recall(before)
    if known is not None and expected in (None, known):
        return known
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK))
    position = 0
    while count := os.preadv(handle, [buffer], position):
        state.update(buffer[:count])
        position += count
    found = state.hexdigest()
    settled = time.time_ns() - os.fstat(handle).st_ctime_ns > _SETTLED_NS
    if settled and _identity(handle, path) == before:
        _remember(before, found)
    return found


def _identity(handle: int, path: Path) -> list[Any]:
    info = os.fstat(handle)
    stamps = [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]
    return [os.path.realpath(path), *stamps]


def _memory(identity: list[Any]) -> Path:
    name = xxhash.xxh3_128_hexdigest(json.dumps(identity[:2]).encode())
    return safe_files.private_folder("hashes") / f"{name}.json"


def _recall(identity: list[Any]) -> str | None:
    """What a file of this identity hashed to. Nothing that others could have written counts."""
    try:
        memory = _memory(identity)
        if safe_files.distrust(memory) is not None:
            return None
        found = json.loads(safe_files.read_bytes(memory, 1 << 16))
        if is_sealed(found) and found["identity"] == identity and _HASH.fullmatch(found["hash"]):
            return str(found["hash"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return None


def _remember(identity: list[Any], found: str) -> None:
    """Best effort: without it the file is read again next time."""
    with contextlib.suppress(OSError):
        memory = _memory(identity)
        staged = memory.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:  # noqa: PTH123
                stream.write(json.dumps(sealed({"identity": identity, "hash": found})))
            staged.replace(memory)
        finally:
            staged.unlink(missing_ok=True)


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write ``hashes.json``: what the named files of ``folder`` hold now, for `check_folder`."""
    found = {}
    for name in sorted(names):
        with safe_files.open_regular(folder / name) as stream:
            size = os.fstat(stream.fileno()).st_size
            found[name] = {"size": size, "xxh3_128": content_hash(stream, folder / name)}
    text = json.dumps(sealed({"format": 1, "files": found}), indent=1) + "\n"
    (folder / SUMS_FILE).write_text(text, encoding="utf-8", newline="\n")


def read_sums(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of a folder's ``hashes.json``, empty without one. Raises DataError."""
    path = folder / SUMS_FILE
    try:
        document = json.loads(safe_files.read_text(path))
    except FileNotFoundError:
        return {}
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}; {_mend(path)}") from None
    found = document.get("files") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not is_sealed(document):
        raise DataError(f"{path}: does not match its own hash; {_mend(path)}")
    if document.get("format") != 1 or not all(map(is_entry, found.values())):
        raise DataError(f"{path}: not of format 1; {_mend(path)}")
    return found


def check_folder(folder: Path, weights: bool = True) -> None:
    """Raise DataError if a file that ``hashes.json`` names is gone or not what was written.

    ``weights`` False passes over the safetensors files. A folder without a ``hashes.json`` passes:
    there is nothing to compare with.
    """
    if os.environ.get(NO_VERIFY):
        return
    mend = _mend(folder / SUMS_FILE)
    for name, wanted in sorted(read_sums(folder).items()):
        path = folder / name
        if path.suffix == ".safetensors" and not weights:
            continue
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{folder / SUMS_FILE}: {name!r} is no file of its folder; {mend}")
        try:
            stream = safe_files.open_regular(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {mend}") from None
        with stream:
            check(stream, path, wanted, mend)


def _mend(sums: Path) -> str:
    return (
        f"restore the files, or remove {sums} if the change was meant; --no-verify takes them as "
        "they are"
    )
