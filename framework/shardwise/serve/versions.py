"""A learned adapter on disk: what `learn` writes into its folder, and `serve` watches there.

    current.json            the pointer: {"version": NAME, "hash": of its files}
    versions/NAME/          adapter_config.json, adapter_model.safetensors, lineage.json
    refused/NAME/           the same, of one that the gate refused, with the reasons
    work/                   of a `learn` that has not ended

A version is moved into place whole, and the pointer is replaced in one step behind it: what the
pointer names is there, complete, at any moment. A version's name is a hash of all that made it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import xxhash

from shardwise import safe_files
from shardwise.adapters.peft import CONFIG, WEIGHTS
from shardwise.errors import CheckpointError, UserError
from shardwise.storage.durable import make_folder, named, sync_folder, sync_tree, write_durably

POINTER, VERSIONS, REFUSED, WORK, LINEAGE = (
    "current.json", "versions", "refused", "work", "lineage.json",
)  # fmt: skip
_NAME = re.compile(r"[0-9a-f]{32}")


def check_name(version: str) -> str:
    """A version's name, which can be no path. Raises UserError."""
    if not _NAME.fullmatch(version):
        raise UserError("a version's name is 32 digits of 0-9a-f")
    return version


def current(out: Path) -> str | None:
    """The version that the pointer names; None: there is no pointer. Raises CheckpointError."""
    try:
        said = safe_files.parse_json(safe_files.read_bytes(out / POINTER, 1 << 16))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{out / POINTER}: cannot be read: {error}") from None
    version = said.get("version") if isinstance(said, dict) else None
    if not isinstance(version, str) or not _NAME.fullmatch(version):
        raise CheckpointError(f"{out / POINTER}: names no version")
    return version


def folder(out: Path, version: str) -> Path:
    """Where a version lies. Raises CheckpointError unless it is whole, as it was written."""
    path = out / VERSIONS / check_name(version)
    lineage = read_lineage(path)
    if lineage.get("hash") != (found := files_hash(path)):
        raise CheckpointError(f"{path}: damaged: its files' hash is {found}, no longer as written")
    return path


def read_lineage(path: Path) -> dict[str, Any]:
    """What made a version. Raises CheckpointError."""
    try:
        found = safe_files.parse_json(safe_files.read_bytes(path / LINEAGE))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path / LINEAGE}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path / LINEAGE}: is no lineage")
    return found


def files_hash(path: Path) -> str:
    """xxh3-128 of an adapter's files. Raises CheckpointError."""
    hasher = xxhash.xxh3_128()
    for name in (CONFIG, WEIGHTS):
        try:
            with safe_files.open_regular(path / name) as stream:
                while block := stream.read(1 << 24):
                    hasher.update(block)
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}") from None
        hasher.update(name.encode())
    return hasher.hexdigest()


def commit(out: Path, made: Path, lineage: dict[str, Any], *, accepted: bool) -> Path:
    """Move ``made`` (an adapter's folder) among the versions, or aside; returns where it is.

    An accepted one is what the pointer names from then on. Once more with the same: no harm.
    """
    version = check_name(lineage["version"])
    place = out / (VERSIONS if accepted else REFUSED) / version
    if not (place / LINEAGE).exists():
        lineage = {**lineage, "hash": files_hash(made)}
        write_durably(made / LINEAGE, (json.dumps(lineage, indent=1) + "\n").encode())
        with named(place):
            sync_tree(made)
            make_folder(place.parent)
            made.rename(place)
            sync_folder(place.parent)
    if accepted:
        point(out, version)
    return place


def point(out: Path, version: str) -> None:
    """Let the pointer name a version, which is whole."""
    pointer = {"version": version, "hash": read_lineage(folder(out, version))["hash"]}
    write_durably(out / POINTER, (json.dumps(pointer) + "\n").encode())
