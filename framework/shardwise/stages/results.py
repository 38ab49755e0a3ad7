"""What a run stores of what is done: sealed, so that damage is noticed, and never believed then."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from shardwise import safe_files
from shardwise.checkpoint import manifest
from shardwise.checkpoint.manifest import DamagedError
from shardwise.checkpoint.ranks import Ranks
from shardwise.storage.durable import set_aside, write_durably

RESULT_FILE = "result.json"  # of a stage, in its folder


def write_result(path: Path, document: Mapping[str, Any]) -> None:
    """Store a document durably; call it on one rank. Raises StorageError."""
    write_durably(path, manifest.seal(document))


def read_result(path: Path, keys: Collection[str] = ()) -> dict[str, Any] | None:
    """What `write_result` stored; None if it is missing, or damaged: that is kept aside, and told.

    A collective call: rank 0 reads, so that all decide alike. ``keys`` must be in it. A document of
    an older version carries no hash.
    """
    ranks = Ranks.of(None)
    found: dict[str, Any] | None = ranks.share(read_here(path, keys) if ranks.rank == 0 else None)
    return found


def read_here(path: Path, keys: Collection[str] = ()) -> dict[str, Any] | None:
    """`read_result` on one rank."""
    try:
        data = safe_files.read_bytes(path)
        document = json.loads(data)
        if isinstance(document, dict) and "xxh3_128" in document:
            document = manifest.unseal(data, path)
        if not isinstance(document, dict) or not set(keys) <= document.keys():
            raise DamagedError(f"{path}: not what was stored")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, DamagedError) as error:
        set_aside(path, f"damaged ({error}); it is made anew")
        return None
    return document
