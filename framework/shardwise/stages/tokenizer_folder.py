"""The run's tokenizer on disk: complete or absent, checked by content, mended from a checkpoint.

``ready`` inside says of which recipe section the folder was made and what its files hold. Every
checkpoint of the run carries the folder, so a damaged one is no reason to stop.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import xxhash

from shardwise import checkpoint
from shardwise.checkpoint import manifest
from shardwise.data.tokenizer import load_tokenizer
from shardwise.errors import CheckpointError, ShardwiseError
from shardwise.storage.durable import make_folder, named, set_aside, sync_folder, sync_tree

TOKENIZER_FOLDER = "tokenizer"
MARK = "ready"
# What a checkpoint holds besides the folder.
NOT_TOKENIZER = ("config.yaml", "stage.json", "model.json")


@contextlib.contextmanager
def filled(folder: Path, section: str) -> Iterator[Path]:
    """An empty folder for the body to fill, which then becomes ``folder``, durably and at once.

    ``section``: the hash of the recipe's section that it is made from.
    """
    fresh = folder.with_name(f".{folder.name}.tmp-{secrets.token_hex(6)}")
    with named(folder):
        make_folder(fresh)
        try:
            yield fresh
            if not (fresh / MARK).exists():
                mark = {"section": section, "files": _hashes(fresh)}
                (fresh / MARK).write_bytes(manifest.seal(mark))
            sync_tree(fresh)
            if os.path.lexists(folder):
                set_aside(folder, "the tokenizer's files are damaged or incomplete")
            fresh.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def section_of(folder: Path) -> str | None:
    """Of which section a sound folder was made; None if it is missing or damaged.

    Empty if an older version made it and did not say; files that it did not hash must be readable.
    """
    try:
        data = (folder / MARK).read_bytes()
        if not data or manifest.is_hash(data.decode("ascii", "replace")):
            load_tokenizer(folder)
            return data.decode()
        mark = manifest.unseal(data, folder / MARK)
        return str(mark["section"]) if mark["files"] == _hashes(folder) else None
    except (OSError, ValueError, KeyError, ShardwiseError):
        return None


def restore(folder: Path, stages: Path) -> Path | None:
    """Bring ``folder`` back from the newest checkpoint that has a sound one; which it was.

    ``stages``: the folder of the run's stages.
    """
    roots = sorted(stages.glob("*/checkpoints"), key=lambda p: p.stat().st_mtime, reverse=True)
    for source in filter(None, map(checkpoint.latest, roots)):
        with contextlib.suppress(CheckpointError):
            files = checkpoint.read_files(source)
            if MARK not in files:
                continue
            with filled(folder, "") as fresh:
                for name, data in files.items():
                    if name not in NOT_TOKENIZER:
                        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                        (fresh / name).write_bytes(data)
            return source
    return None


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MARK)
    return {
        p.relative_to(folder).as_posix(): xxhash.xxh3_128_hexdigest(p.read_bytes()) for p in files
    }
